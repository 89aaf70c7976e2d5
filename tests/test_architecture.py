"""Which module may import which, and what a scan may not pull in; and the linters, which are tests like others."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import Make

import bnbfix

PACKAGE = Path(bnbfix.__file__).parent
ROOT = PACKAGE.parent
FILES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}

# From the ground up: a module imports from rows above its own alone. A new module needs a place here.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("safetensors_header", "source", "beside", "refusals", "json_edit", "skip_modules", "codes", "vllm_releases"),
    ("quant_state", "ranges", "card", "hub_client"),
    ("checkpoint", "hub"),
    ("locate",),
    ("gemma4",),
    ("parameters",),
    ("rules",),
    ("scanner",),
    ("native", "syscalls"),
    ("kernels", "decode", "layout", "installed", "selection", "grid", "pipeline"),
    ("experts", "values"),
    ("mend", "recompute"),
    ("assemble", "unpack"),
    ("plan",),
    ("destination", "output_file", "record"),
    ("write",),
    ("supply",),
    ("verifier", "outcome"),
    ("publish",),
    ("words", "api"),
    ("lines", "report", "report_json", "report_markdown", "report_github", "report_sarif", "report_html"),
    ("report_map",),
    ("report_table", "terminal"),
    ("cli_scan", "pre_commit"),
    ("cli",),
    ("__main__", "__init__"),
)
APART = "vllm_worker"  # runs in a process of its own, and knows nothing of the rest
SCANNING = [name for row in LAYERS[:9] for name in row]
REMOTE = {"hub", "hub_client", "ranges", "refusals"}  # of a scan of a repo alone
PLANNING = {"json_edit", "card"}  # of no scan

# Who may import what is neither the standard library nor ours. Nobody else may, inside a function neither.
THIRD_PARTIES: dict[str, set[str]] = {
    "torch": {"kernels", APART},
    "bitsandbytes": {"kernels"},
    "huggingface_hub": {"hub", "hub_client"},
    "numpy": {"decode", "native"},
    "rich": {"report", "terminal", "cli"},
    "typer": {"cli", "cli_scan"},
    "vllm": {APART},
    "vllm_bnb_plugin": {APART},
}


@dataclass(frozen=True)
class Import:
    """One imported name: `module` of ours, or the top-level package of others."""

    ours: bool
    module: str
    line: int


def imports(name: str) -> Iterator[Import]:
    """Every import in a module, wherever it stands: at the top, in a function, for the type checker."""
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name.split(".")[0] == "bnbfix", alias.name.split(".")[0], node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{name}:{node.lineno} climbs out of the package"
            if node.module:
                yield Import(True, node.module, node.lineno)
            else:  # `from . import x`: a module, or a name of the package itself, which is there already
                yield from (Import(True, a.name, node.lineno) for a in node.names if a.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield Import(False, node.module.split(".")[0], node.lineno)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("import_module", "__import__"):
            if isinstance(node.args[0], ast.Constant):
                yield Import(False, str(node.args[0].value).split(".")[0], node.lineno)


ARROWS = {name: {i.module for i in imports(name) if i.ours} for name in FILES}


def test_the_walk_over_imports_finds_them() -> None:
    assert {"torch", "bitsandbytes"} <= {i.module for i in imports("kernels") if not i.ours}
    assert {"errors", "quant_state", "source", "safetensors_header"} <= ARROWS["checkpoint"]
    assert "verifier" in ARROWS["api"], "imports inside functions count"


def test_every_module_has_its_place() -> None:
    placed = [name for row in LAYERS for name in row] + [APART]
    assert sorted(placed) == sorted(FILES)


def test_imports_make_no_circle() -> None:
    order = list(TopologicalSorter(ARROWS).static_order())
    assert set(order) == set(FILES)


@pytest.mark.parametrize("name", sorted(set(FILES) - {APART}))
def test_a_module_imports_from_layers_below_alone(name: str) -> None:
    height = {module: i for i, row in enumerate(LAYERS) for module in row}
    climbing = {module for module in ARROWS[name] if height.get(module, len(LAYERS)) >= height[name]}
    assert climbing == set()


@pytest.mark.parametrize("name", SCANNING)
def test_scanning_imports_nothing_of_repairing_or_reporting(name: str) -> None:
    assert ARROWS[name] <= set(SCANNING)


def test_the_worker_inside_vllms_process_stands_apart() -> None:
    assert ARROWS[APART] == set()
    assert not any(APART in found for found in ARROWS.values())


@pytest.mark.parametrize("name", sorted(FILES))
def test_third_parties_are_imported_where_they_may_be_alone(name: str) -> None:
    known = set(sys.stdlib_module_names) | {package for package, users in THIRD_PARTIES.items() if name in users}
    strangers = {f"{i.module}, line {i.line}" for i in imports(name) if not i.ours and i.module not in known}
    assert strangers == set()


@pytest.mark.parametrize(("package", "users"), THIRD_PARTIES.items())
def test_whoever_may_import_a_third_party_does(package: str, users: set[str]) -> None:
    found = {name for name in FILES if package in {i.module for i in imports(name) if not i.ours}}
    assert found == users


@pytest.mark.parametrize("name", sorted(set(FILES) - {"report", "terminal", "cli_scan", "cli"}))
def test_only_the_report_and_the_command_line_print(name: str) -> None:
    tree = ast.parse(FILES[name].read_text("utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    printing = [n.lineno for n in calls if getattr(n.func, "id", "") in ("print", "input")]
    writing = [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and n.attr in ("stdout", "stderr") and getattr(n.value, "id", "") == "sys"
    ]
    assert printing == []
    assert writing == [] or name == APART


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_is_longer_than_400_lines(name: str) -> None:
    assert len(FILES[name].read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert len(ast.get_docstring(ast.parse(FILES[name].read_text("utf-8"))) or "") > 10


HEAVY = {"torch", "bitsandbytes", "numpy", "rich", "typer", "safetensors", "transformers", "vllm", "huggingface_hub"}
LEFT_OUT = f"print(sorted({HEAVY} & set(sys.modules)), sorted(m for m in sys.modules if m.startswith('bnbfix.')))"


def loaded(code: str) -> tuple[str, set[str]]:
    """(the heavy modules that code imports, as printed; which modules of ours) in a fresh interpreter."""
    command = [sys.executable, "-c", f"import sys\n{code}\n{LEFT_OUT}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    heavy, ours = done.stdout.strip().split("] [")
    return heavy + "]", {part.strip(" ]'").removeprefix("bnbfix.") for part in ours.split(",")} - {""}


def test_importing_the_package_imports_nothing_of_it() -> None:
    assert loaded("import bnbfix") == ("[]", set())


def test_a_scan_imports_nothing_heavy_and_nothing_of_repairing(pristine: Make) -> None:
    source = str(pristine("dense31b", "ragged", shards=2))
    heavy, ours = loaded(f"import bnbfix\nassert not bnbfix.scan({source!r}, vllm='portable').ok")
    assert heavy == "[]"
    assert ours == set(SCANNING) - PLANNING - REMOTE | {"api"}


def test_planning_a_repair_imports_nothing_heavy(pristine: Make) -> None:
    source = str(pristine("dense31b", "ragged", shards=2))
    heavy, _ = loaded(f"import bnbfix\nassert bnbfix.plan_repair({source!r}, 'portable').edits")
    assert heavy == "[]"


def test_a_repair_with_nothing_to_do_imports_nothing_heavy(pristine: Make, tmp_path: Path) -> None:
    source, out = str(pristine("e4b", "all", shards=2)), str(tmp_path / "out")
    heavy, _ = loaded(f"import bnbfix\nassert not bnbfix.repair({source!r}, {out!r}, vllm='0.32.0').written")
    assert heavy == "[]"


def tool(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    tool("ruff", "check", "--no-cache", ".")


def test_mypy_finds_nothing_in_strict_mode() -> None:
    tool("mypy", "--strict", "-p", "bnbfix")
