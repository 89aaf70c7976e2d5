"""An engine that bnbfix has never heard of costs a folder: no line of what is there changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.families import make_family

# It does what vLLM's newest release does, but understands a skip entry by its end, and none for several modules.
ENGINE = """
from dataclasses import replace
from bnbfix.engines.vllm.engine import ENGINE as VLLM

class Expected:
    def __init__(self, theirs):
        self.theirs = theirs

    def __getattr__(self, name):
        return getattr(self.theirs, name)

    def skips(self, entry, module):
        return entry.endswith(module)

class Nothing:
    name, command = "Nothing", ("nothing", "run")
    ranges = tuple(
        replace(VLLM.ranges[-1], engine="Nothing", first=first, last=last, plugin="none")
        for first, last in (("1.0.0", "1.9.0"), ("2.0.0", "2.0.0"))
    )

    def expect(self, model, release):
        theirs = VLLM.expect(model, VLLM.ranges[-1])
        return theirs and Expected(theirs)

    def find_refusal(self, model, release):
        return None

    def serving_packages(self, target):
        return [f"nothing=={target.release}"]

ENGINE = Nothing()
"""
RUN = """
import sys
import bnbfix.engines
bnbfix.engines.__path__.append(sys.argv.pop(1))
from bnbfix.cli.main import main
main()
"""


def test_a_folder_is_all_that_an_engine_needs(tmp_path: Path) -> None:
    folder = tmp_path / "engines" / "nothing"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "engine.py").write_text(ENGINE, "utf-8")
    other, out = make_family(tmp_path / "other", "Qwen3VLForConditionalGeneration", "skip"), tmp_path / "out"
    source = make_family(tmp_path / "source", "LlamaForCausalLM", "partial")

    def bnbfix(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", RUN, folder.parent, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    shown = bnbfix("releases").stdout
    assert "0.19.0-0.22.1" in shown and "1.0.0-1.9.0" in shown
    rows = json.loads(bnbfix("releases", "--json").stdout)["ranges"]
    assert [r["engine"] for r in rows] == ["vLLM"] * (len(rows) - 2) + ["Nothing"] * 2

    assert bnbfix("scan", other, "--vllm", "0.32.0").returncode == 1
    assert bnbfix("scan", other, "--vllm", "Nothing:2.0").returncode == 0
    done = bnbfix("scan", source, "--vllm", "Nothing:portable")
    assert done.returncode == 1
    assert re.search("^Nothing +verdict", done.stdout, re.M) and "Nothing 1.0.0-2.0.0 wrong: " in done.stdout
    assert done.stdout.rstrip().endswith("--vllm Nothing:portable")

    assert bnbfix("repair", source, "--out", out, "--vllm", "Nothing:1.2", "--device", "cpu").returncode == 0
    assert "self_attn.qkv_proj" in (out / "config.json").read_text("utf-8")
    done = bnbfix("verify", out, "--source", source)
    assert done.returncode == 0
    assert f"pip install nothing==1.2\n  nothing run {out}" in done.stdout

    done = bnbfix("scan", source, "--vllm", "Something:1.0")
    assert done.returncode == 2
    assert "'Something:1.0' names no engine that bnbfix knows" in done.stderr
    assert "The engines are vLLM, Nothing." in done.stderr
