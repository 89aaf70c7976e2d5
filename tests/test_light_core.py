"""What `pip install bnbfix` brings, without an extra: enough for all that computes nothing, and words for the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bnbfix
from bnbfix.kernels.packages import SMALLER
from tests.support.build import Make
from tests.support.command_line import Run

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
ROOT = Path(bnbfix.__file__).parent.parent
INSTALL = f": pip install 'bnbfix[repair]'\n  {SMALLER}\n"


def required(lines: list[str]) -> set[str]:
    """Names of what requirements bring, with all that this requires in turn, extras left out."""
    found: set[str] = set()
    todo = lines
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            found.add(requirement.name)
            todo += metadata.requires(requirement.name) or []
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the packages of the core, and no other."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "bnbfix").symlink_to(ROOT / "bnbfix")
    for name in required(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(str(distribution.locate_file(top)))
    return folder


def core(site: Path, *arguments: object, module: str = "bnbfix") -> Run:
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    command = [sys.executable, "-S", "-m", module, *map(str, arguments)]  # -S: no site-packages
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(site)}, cwd=site, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


def test_the_core_is_light(site: Path) -> None:
    names = {path.name for path in site.iterdir()}
    assert {"bnbfix", "rich", "typer", "huggingface_hub"} <= names
    assert not names & {"torch", "bitsandbytes", "numpy", "safetensors", "transformers"}


def test_a_scan_a_plan_and_the_words_need_no_more(site: Path, pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    assert core(site, "scan", source, "--vllm", "portable", "--map").code == 1
    for format in ("json", "html", "sarif", "markdown"):
        assert core(site, "scan", source, "--vllm", "portable", "--format", format).code == 1
    assert "dequantized" in core(site, "repair", source, "--vllm", "portable", "--dry-run").out
    assert core(site, "releases").code == core(site, "explain", "BNB101").code == core(site, "--help").code == 0


def test_a_repair_of_config_json_and_its_proof_need_no_more(site: Path, pristine: Make, tmp_path: Path) -> None:
    source, out = pristine("dense31b", "skip", shards=2), tmp_path / "out"
    done = core(site, "repair", source, "--vllm", "0.32.0", "--out", out)
    assert (done.code, done.err) == (0, "") and (out / "bnbfix.json").exists()
    assert core(site, "verify", out, "--source", source).code == 0
    assert core(site, "scan", out, "--vllm", "0.32.0").code == 0


@pytest.mark.parametrize(
    ("quant", "options", "words"),
    [
        (("dense31b", "partial"), ["--vllm", "portable"], "this repair dequantizes"),
        (("moe26b", "skip"), ["--vllm", "0.32.0"], "this repair quantizes"),
        (("dense31b", "skip"), ["--vllm", "0.32.0", "--device", "cuda"], "device cuda takes torch"),
    ],
    ids=str,
)
def test_a_repair_that_computes_says_what_to_install(
    site: Path, pristine: Make, tmp_path: Path, quant: tuple[str, str], options: list[str], words: str
) -> None:
    done = core(site, "repair", pristine(*quant), "--out", tmp_path / "out", *options)
    assert (done.code, done.out, done.err) == (2, "", f"error: {words}{INSTALL}")
    assert os.listdir(tmp_path) == []


def test_checking_decoded_numbers_says_what_to_install(site: Path, pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "partial", shards=2)
    bnbfix.repair(source, tmp_path / "out", "portable")
    assert core(site, "verify", tmp_path / "out").code == 0
    done = core(site, "verify", tmp_path / "out", "--source", source)
    assert done.code == 2 and done.err.endswith(f"checking that takes numpy{INSTALL}")


def test_the_checks_before_an_upload_and_a_commit_need_no_more(site: Path, pristine: Make) -> None:
    good, bad = pristine("e4b", "all"), pristine("dense31b", "partial")
    hook = "bnbfix.cli.pre_commit"
    assert core(site, "--vllm", "0.32.0", good / "config.json", module=hook).code == 0
    assert core(site, "--vllm", "0.32.0", bad / "config.json", module=hook).code == 1
    code = f"import bnbfix; assert bnbfix.check_before_upload({str(good)!r}, '0.32.0').ok"
    subprocess.run([sys.executable, "-S", "-c", code], env=os.environ | {"PYTHONPATH": str(site)}, check=True)


def test_the_json_is_the_same(site: Path, pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    done = core(site, "scan", source, "--vllm", "portable", "--format", "json")
    assert json.loads(done.out)["findings"] == bnbfix.scan(source, "portable").to_dict()["findings"]
