"""Which folder may import which, and what a scan may not pull in; and the linters, which are tests like others."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bnbfix
from tests.support.build import Make

PACKAGE = Path(bnbfix.__file__).parent
ROOT = PACKAGE.parent
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}

# From the ground up: a module imports from its own folder and from those above it in this list.
FOLDERS = (
    "errors",
    "__version__",
    "checkpoint",
    "hub",
    "models",
    "engines",
    "rules",
    "kernels",
    "planner",
    "writer",
    "verifier",
    "report",
    "api",
    "fleet",
    "cli",
    "__init__",
    "__main__",
)
INSIDE = "engines.vllm.inside"  # runs in a process of its own, under any Python that has vLLM: it knows only itself
NOT_OF_A_SCAN = {"kernels", "planner", "writer", "verifier", "report", "fleet", "cli"}

# Who may import what is neither the standard library nor ours. Nobody else may, inside a function neither.
THIRD_PARTIES: dict[str, set[str]] = {
    "torch": {
        "kernels.bnb",
        "kernels.device",
        *(f"{INSIDE}.{name}" for name in ("dry_load", "engine", "expect", "load", "probe")),
    },
    "bitsandbytes": {"kernels.bnb", f"{INSIDE}.dry_load", f"{INSIDE}.engine"},
    "huggingface_hub": {"hub.source", "hub.client", "hub.listing"},
    "numpy": {"kernels.reference", "kernels.native"},
    "ray": {"fleet.cluster"},
    "rich": {"report.results", "report.terminal"},
    "typer": {f"cli.{name}" for name in ("app", "fleet", "options", "releases", "repair", "scan", "verify")},
    "vllm": {f"{INSIDE}.{name}" for name in ("dry_load", "engine", "expect", "load", "probe")},
    "vllm_bnb_plugin": {f"{INSIDE}.probe"},
}
PRINTING = {"report", "cli"}


def imports(name: str) -> Iterator[tuple[bool, str, int]]:
    """(is it ours? the module, the line) of every import, wherever it stands: at the top, in a function, for types."""
    folder = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    if folder == ["__init__"]:
        folder = []
    folder = [part for part in folder if part != "__init__"]
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((False, alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]
            module = ".".join(filter(None, base))
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                yield (
                    True,
                    inner if inner in FILES else module if module in FILES else f"{module}.__init__",
                    node.lineno,
                )
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield False, node.module.split(".")[0], node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("import_module", "__import__"):
            if isinstance(node.args[0], ast.Constant):
                yield False, str(node.args[0].value).split(".")[0], node.lineno


ARROWS = {name: {module for ours, module, _ in imports(name) if ours} for name in FILES}


def folder_of(module: str) -> str:
    return module.split(".")[0]


def test_the_walk_over_imports_finds_them() -> None:
    assert {"torch", "bitsandbytes"} <= {module for ours, module, _ in imports("kernels.bnb") if not ours}
    assert {"errors", "checkpoint.quant_state", "checkpoint.source"} <= ARROWS["checkpoint.checkpoint"]
    assert "verifier.verify" in ARROWS["api"], "imports inside functions count"


def test_every_folder_has_its_place() -> None:
    assert {folder_of(name) for name in FILES} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_from_folders_below_it(folder: str) -> None:
    below = set(FOLDERS[: FOLDERS.index(folder)]) | {folder}
    climbing = {(n, m) for n, ms in ARROWS.items() if folder_of(n) == folder for m in ms if folder_of(m) not in below}
    assert climbing == set()


def test_imports_make_no_circle() -> None:
    try:
        order = list(TopologicalSorter(ARROWS).static_order())
    except CycleError as e:
        pytest.fail(f"a circle: {' <- '.join(e.args[1])}")
    assert set(order) == set(FILES)


def test_themes_of_rules_do_not_know_each_other() -> None:
    frame = {"__init__", "rule", "changes", "scan", "selection"}
    themes = {name for name in FILES if folder_of(name) == "rules"} - {f"rules.{name}" for name in frame}
    assert len(themes) >= 8
    assert {(name, module) for name in themes for module in ARROWS[name] & themes} == set()


def test_folders_are_small() -> None:
    folders = {path.parent for path in FILES.values()}
    sizes = {f: len([p for p in f.iterdir() if p.is_file() and p.name != "__init__.py"]) for f in folders}
    assert {str(f): n for f, n in sizes.items() if n > (8 if f == PACKAGE else 12)} == {}


def test_what_runs_inside_vllms_process_knows_only_itself() -> None:
    inside = {name for name in FILES if name.startswith(INSIDE)}
    assert {module for name in inside for module in ARROWS[name]} <= inside
    assert not any(ARROWS[name] & inside for name in set(FILES) - inside)


@pytest.mark.parametrize("name", sorted(FILES))
def test_third_parties_are_imported_only_where_they_may_be(name: str) -> None:
    known = set(sys.stdlib_module_names) | {package for package, users in THIRD_PARTIES.items() if name in users}
    strangers = {f"{module}, line {line}" for ours, module, line in imports(name) if not ours and module not in known}
    assert strangers == set()


@pytest.mark.parametrize(("package", "users"), THIRD_PARTIES.items())
def test_whoever_may_import_a_third_party_does(package: str, users: set[str]) -> None:
    found = {name for name in FILES if package in {module for ours, module, _ in imports(name) if not ours}}
    assert found == users


@pytest.mark.parametrize("name", sorted(n for n in FILES if folder_of(n) not in PRINTING and n != "__main__"))
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
    assert writing == [] or name.startswith(INSIDE)


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
    assert loaded("import bnbfix") == ("[]", {"__version__"})


def test_a_scan_imports_nothing_heavy_and_nothing_of_repairing(pristine: Make) -> None:
    source = str(pristine("dense31b", "partial", shards=2))
    heavy, ours = loaded(f"import bnbfix\nassert not bnbfix.scan({source!r}, vllm='portable').ok")
    assert heavy == "[]"
    assert {folder_of(m) for m in ours} & NOT_OF_A_SCAN == set()
    assert {"api", "rules.scan"} <= ours and not any(m.startswith("hub.") and m != "hub.resolve" for m in ours)


def test_planning_a_repair_imports_nothing_heavy(pristine: Make) -> None:
    source = str(pristine("dense31b", "partial", shards=2))
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
    tool("ruff", "format", "--check", "--no-cache", ".")


def test_mypy_finds_nothing_in_strict_mode() -> None:
    tool("mypy", "--strict", "-p", "bnbfix")
