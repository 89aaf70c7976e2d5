"""A class that bnbfix has never heard of costs a profile: data, and no line of code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from bnbfix.engines.vllm.profiles import FOLDER, INDEX
from tests.support.families import make_family

NAME = "NothingForCausalLM"
RUN = """
import sys
from pathlib import Path
from bnbfix.engines.vllm import profiles
profiles.FOLDER = Path(sys.argv.pop(1))
from bnbfix.cli.main import main
main()
"""


def test_a_profile_is_all_that_a_class_needs(tmp_path: Path) -> None:
    profiles = Path(shutil.copytree(FOLDER, tmp_path / "profiles"))
    profile = json.loads((profiles / "LlamaForCausalLM.json").read_text("utf-8")) | {"architecture": NAME}
    (profiles / f"{NAME}.json").write_text(json.dumps(profile), "utf-8")
    index = json.loads((profiles / INDEX).read_text("utf-8"))
    (profiles / INDEX).write_text(json.dumps(index | {NAME: profile["known"]}), "utf-8")
    source = make_family(tmp_path / "source", "LlamaForCausalLM", "partial")
    config = (source / "config.json").read_text("utf-8")
    (source / "config.json").write_text(config.replace("LlamaForCausalLM", NAME), "utf-8")

    def bnbfix(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", RUN, profiles, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    assert NAME in bnbfix("releases").stdout
    assert bnbfix("scan", source, "--vllm", "0.32.0").returncode == 1
    assert bnbfix("repair", source, "--out", tmp_path / "out", "--vllm", "0.32.0", "--device", "cpu").returncode == 0
    assert bnbfix("scan", tmp_path / "out", "--vllm", "0.32.0").returncode == 0
    assert bnbfix("verify", tmp_path / "out", "--source", source).returncode == 0
