"""`bnbfix fleet`: scans and repairs of many models, here or on a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engines.engine import PORTABLE
from ..engines.targets import resolve_target
from ..errors import UsageError
from ..report.next_step import command_line
from ..report.terminal import print_warning, show_logs, show_status, write_file, write_text
from ..report.text import SHOWN, escape_control_chars
from ..rules.selection import worst
from .options import OUTPUT, Command, FleetVllm, Group, Quiet, Verbose
from .repair import read_size
from .run_scan import read_listed
from .signals import Interrupted

if TYPE_CHECKING:
    from ..fleet.results import Row
    from ..fleet.run import Workers

WORKERS = "Workers"  # a panel of the help
SCANS, REPAIRS = "fleet-scan.jsonl", "fleet-repair.jsonl"  # where results go unless --output says

app = typer.Typer(name="fleet", cls=Group, help="Scan or repair many models, on this machine or on a Ray cluster.")

From = Annotated[
    str | None, typer.Option("--from", metavar="FILE", help="The models listed in FILE, one per line; - is stdin.")
]
Org = Annotated[str | None, typer.Option("--org", metavar="ORG", help="Every model of an organization on the Hub.")]


def _output(default: str) -> Any:
    return typer.Option(
        "--output",
        metavar="FILE",
        rich_help_panel=OUTPUT,
        help="JSON Lines, a line for each model, and a page next to it as .html. What is finished in it is not done "
        f"again. Default: {default}.",
    )


def _jobs(default: str) -> Any:
    return typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        show_default=False,
        rich_help_panel=WORKERS,
        help=f"Processes here. Default: {default}.",
    )


Baseline = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        metavar="OLD.jsonl",
        rich_help_panel=OUTPUT,
        help="Print what changed since an older scan, in Markdown; exit 1 only for new findings.",
    ),
]
Rate = Annotated[
    float,
    typer.Option(
        "--rate", metavar="N", rich_help_panel=WORKERS, help="Requests per second to the Hub, of all workers together."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", rich_help_panel=WORKERS, help="Run on this Ray cluster: auto, host:6379."),
]
Cpus = Annotated[float, typer.Option("--cpus", metavar="N", rich_help_panel=WORKERS, help="CPUs for a model, on Ray.")]
Gpus = Annotated[float, typer.Option("--gpus", metavar="N", rich_help_panel=WORKERS, help="GPUs for a model, on Ray.")]
Memory = Annotated[
    str, typer.Option("--memory", metavar="SIZE", rich_help_panel=WORKERS, help="RAM for a model, on Ray.")
]
Disk = Annotated[
    str | None,
    typer.Option(
        "--disk",
        metavar="SIZE",
        rich_help_panel=WORKERS,
        help="Disk for a model, on Ray, whose nodes say what they have, in GB: the resource 'disk'.",
    ),
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=WORKERS,
        help="Where a worker writes a repaired copy before it is pushed. Default: next to --output.",
    ),
]


@app.command(cls=Command, epilog="Example: bnbfix fleet scan --org acme --baseline last-month.jsonl")
def scan(
    source: From = None,
    org: Org = None,
    output: Annotated[Path | None, _output(SCANS)] = None,
    vllm: FleetVllm = None,
    baseline: Baseline = None,
    jobs: Annotated[int | None, _jobs("one per core")] = None,
    rate: Rate = 5,
    ray: Ray = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0,
    memory: Memory = "500MB",
    disk: Disk = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Scan every model: what would go wrong, in every release."""
    from ..fleet.changes import changes_code, find_changes, render_changes
    from ..fleet.results import read_rows

    show_logs(verbose)
    old = read_rows(baseline) if baseline else None
    workers = _choose_workers(jobs, rate, ray, cpus, gpus, memory, disk)
    rows = _run(source, org, output or Path(SCANS), vllm, workers, quiet=quiet)
    if old is not None:
        changes = find_changes(old, rows, resolve_target(vllm or PORTABLE))
        write_text(render_changes(changes))
        return changes_code(changes)
    if not quiet:
        _print_errors(rows)
    if not quiet and any(row.exit_code == 1 for row in rows):
        models = ["--from", source] if source else []
        models += ["--org", org] if org else []
        print("Repair them with pull requests:")
        print(f"  {command_line('fleet', 'repair', *models, '--vllm', vllm or PORTABLE)}")
    return worst([row.exit_code for row in rows])


@app.command(cls=Command, epilog="Example: bnbfix fleet repair --org acme --vllm 0.32.0")
def repair(
    source: From = None,
    org: Org = None,
    output: Annotated[Path | None, _output(REPAIRS)] = None,
    vllm: FleetVllm = None,
    scratch: Scratch = None,
    jobs: Annotated[int, _jobs("1")] = 1,
    rate: Rate = 5,
    ray: Ray = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0,
    memory: Memory = "4GB",
    disk: Disk = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Open a pull request for every repo that needs a repair, one for each."""
    from ..hub.client import check_login

    show_logs(verbose)
    check_login()
    workers = _choose_workers(jobs, rate, ray, cpus, gpus, memory, disk)
    rows = _run(source, org, output or Path(REPAIRS), vllm, workers, repair=True, scratch=scratch, quiet=quiet)
    if not quiet:
        _print_errors(rows)
    return worst([row.exit_code for row in rows])


def _choose_workers(
    jobs: int | None, rate: float, ray: str | None, cpus: float, gpus: float, memory: str, disk: str | None
) -> Workers:
    if not rate > 0:
        raise UsageError(f"--rate is {rate:g}, not a positive number")
    if ray is None:
        from ..fleet.local import run_on_processes

        return partial(run_on_processes, jobs=jobs or os.cpu_count() or 1, rate=rate)
    from ..fleet.cluster import Needs, run_on_ray

    memory_bytes, disk_bytes = read_size(memory, "--memory"), read_size(disk, "--disk")
    needs = Needs(cpus, gpus, memory_bytes or 0, (disk_bytes or 0) / 1e9)
    return partial(run_on_ray, address=ray, needs=needs, rate=rate)


def _run(
    source: str | None,
    org: str | None,
    output: Path,
    vllm: str | None,
    workers: Workers,
    *,
    repair: bool = False,
    scratch: Path | None = None,
    quiet: bool,
) -> list[Row]:
    """Runs the fleet, writes its page, and says in a line what came out."""
    from ..fleet.page import count_verdicts, render_fleet
    from ..fleet.results import Results
    from ..fleet.run import run_fleet

    target = resolve_target(vllm or PORTABLE)
    if target.warning:
        print_warning(target.warning)
    if output.suffix == ".html":
        raise UsageError("--output is JSON Lines; the page is written next to it", where=str(output))
    models = _list_models(source, org)
    results = Results(output, "repair" if repair else "scan")
    show = show_status(quiet=quiet)

    def progress(done: int, all: int) -> None:
        show(f"{done} of {all} models" if done < all else "")

    try:
        with redirect_stdout(sys.stderr):  # Ray tells there of nodes that it lost
            rows = run_fleet(models, target, results, workers, repair=repair, scratch=scratch, progress=progress)
    except KeyboardInterrupt:
        show("")
        raise Interrupted(f"interrupted; what is finished is in {output}, and the same command goes on") from None
    finally:
        results.close()
    page = output.with_suffix(".html")
    write_file(page, render_fleet(rows, target.label))
    if not quiet:
        print(f"{count_verdicts(rows)}, for {target.label}. Written: {output}, {page}")
    return rows


def _print_errors(rows: Iterable[Row]) -> None:
    """Why models could not be scanned or repaired: of the first few; the page says it of all."""
    errors = [row for row in rows if row.verdict == "error"]
    for row in errors[:SHOWN]:
        words = row.because if row.because.startswith(row.model) else f"{row.model}: {row.because}"
        print(f"  {escape_control_chars(words)}")
    if len(errors) > SHOWN:
        print(f"  and {len(errors) - SHOWN} more")


def _list_models(source: str | None, org: str | None) -> dict[str, str | None]:
    """The models of --from and of --org, with their commits where those are known."""
    from ..fleet.run import name_models

    if source is None and org is None:
        raise UsageError("names no model", where="fleet", hint="Give --from FILE or --org ORG.")
    models = name_models(read_listed(source)) if source is not None else {}
    if org is not None:
        from ..hub.listing import list_models

        found = list_models(org)
        if not found:
            raise UsageError("has no models on the Hub, or none that this token may see", where=org)
        models |= found
    return models
