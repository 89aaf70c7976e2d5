"""A load without the bytes: what a vLLM is given, what becomes of its answer, and of none. No test has a vLLM."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.engines.vllm import process
from bnbfix.engines.vllm.live import DryLoad, LiveVllm
from bnbfix.errors import EngineError, UsageError
from tests.support.build import Make, opened
from tests.support.command_line import Cli
from tests.support.fake_vllm import VERSIONS, fake_python
from tests.support.processes import wait_for_end

TOWER = "model.vision_tower.patch_embedder.input_proj.weight"


def ask(source: Path, python: str, **options: Any) -> DryLoad:
    (answer,) = LiveVllm(python, **options).dry_load([opened(source)])
    return answer


# What vLLM is given


@pytest.mark.parametrize("shards", [1, 3])
def test_a_vllm_gets_every_tensor_and_no_weight(pristine: Make, tmp_path: Path, shards: int) -> None:
    source = pristine("dense31b", "skip", shards=shards)
    ask(source, fake_python(tmp_path, does=f"shutil.copytree(folder, {str(tmp_path / 'given')!r})"))
    checkpoint, given = opened(source), tmp_path / "given"
    rows = json.loads((given / "bnbfix-tensors.json").read_text())
    have = {name: (t.shard, t.info.dtype, list(t.info.shape)) for name, t in checkpoint.tensors.items()}
    assert {name: (shard, dtype, shape) for shard, name, dtype, shape, _ in rows} == have
    texts = {name: json.loads(text) for _, name, _, _, text in rows if text is not None}
    assert set(texts) == {name for name in have if ".quant_state." in name} and len(texts) == 40
    assert all(doc["quant_type"] == "nf4" and len(doc["shape"]) == 2 for doc in texts.values())
    for shard, header in checkpoint.shards.items():
        raw = (given / shard).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        listed = json.loads(raw[8 : 8 + length])
        assert set(listed) - {"__metadata__"} == set(header.tensors), "a true header"
        assert not any(raw[8 + length :]) and len(raw) == header.file_size - header.data_start + 8 + length, (
            "and a hole"
        )
    assert (given / "config.json").read_text() == (source / "config.json").read_text()
    assert (given / "tokenizer.json").exists()
    assert (given / "model.safetensors.index.json").exists() == (shards > 1)


def test_several_checkpoints_are_asked_about_at_once(pristine: Make, tmp_path: Path) -> None:
    python = fake_python(tmp_path, does="found['requantized'] = [f for f in os.listdir(folder) if '.safetensors' in f]")
    sources = [pristine("dense31b", "skip", shards=n) for n in (1, 3)]
    answers = LiveVllm(python).dry_load(list(map(opened, sources)))
    have = [sorted(p.name for p in source.iterdir() if ".safetensors" in p.name) for source in sources]
    assert [list(a.requantized) for a in answers] == have, "in order"


def test_a_planned_output_is_asked_about_before_it_exists(pristine: Make, tmp_path: Path) -> None:
    source, out = pristine("dense31b", "skip"), tmp_path / "out"
    live = LiveVllm(
        fake_python(tmp_path, does=f"shutil.copy(folder + '/config.json', {str(tmp_path / 'asked.json')!r})")
    )
    result = bnbfix.repair(source, out, dry_load=live, device="cpu")
    assert result.written and result.plan.target.name == "0.32.0"
    assert (tmp_path / "asked.json").read_text() == (out / "config.json").read_text()


# What becomes of the answer


def test_a_vllm_that_loads_it_overrules_what_the_rules_say_of_loading(pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "skip")
    assert bnbfix.scan(source, "0.32.0").verdict == "wrong"
    result = bnbfix.scan(source, dry_load=LiveVllm(fake_python(tmp_path)))
    assert (result.verdict, result.target.name, result.ok) == ("loads", "0.32.0", True)
    assert result.to_dict()["dry_load"]["vllm"] == "0.32.0"
    rows = {v.release.first: v.verdict for v in result.releases}
    assert rows["0.32.0"] == "loads" and rows["0.28.0"] == "wrong", "of other releases it says nothing"


def test_a_load_does_not_overrule_what_only_the_first_forward_pass_shows(pristine: Make, tmp_path: Path) -> None:
    old = fake_python(tmp_path, versions={"vllm": "0.22.1"})
    result = bnbfix.scan(pristine("dense31b", "skip"), dry_load=LiveVllm(old))
    assert (result.verdict, {f.code for f in result.findings if f.counts}) == ("fails", {bnbfix.Code("BNB104")})


@pytest.mark.parametrize(
    ("given", "verdict", "code", "words", "tensors"),
    [
        (
            {"error": f"ValueError: Following weights were not initialized from checkpoint: {{'{TOWER}'}}"},
            "fails",
            "BNB501",
            "vLLM 0.32.0 stops: ValueError: Following weights were not initialized",
            (TOWER,),
        ),
        ({"error": "AssertionError: ", "tensor": TOWER}, "fails", "BNB501", "stops: AssertionError", (TOWER,)),
        ({"unbound": ["layers.0.qkv_proj"]}, "fails", "BNB501", "have no quant state", ("layers.0.qkv_proj",)),
        ({"requantized": [TOWER]}, "wrong", "BNB502", "vLLM 0.32.0 silently quantizes it", (TOWER,)),
        ({"reordered": [TOWER]}, "wrong", "BNB503", "vLLM 0.32.0 reorders its packed bytes", (TOWER,)),
    ],
    ids=["named", "last given", "unbound", "requantized", "reordered"],
)
def test_what_a_vllm_says_against_it_is_a_finding(
    pristine: Make, tmp_path: Path, given: dict[str, Any], verdict: str, code: str, words: str, tensors: tuple[str, ...]
) -> None:
    result = bnbfix.scan(pristine("e4b", "all"), dry_load=LiveVllm(fake_python(tmp_path, **given)))
    assert result.verdict == verdict
    (found,) = [f for f in result.findings if f.code == code]
    assert words in found.message and found.tensors == tensors and found.severity == verdict
    assert found.fix is None and str(found.reason).startswith("no rule finds the cause")


def test_without_a_cause_no_repair_is_proposed(run: Cli, pristine: Make, tmp_path: Path) -> None:
    asking = ("--dry-load", "--python", fake_python(tmp_path, error="ValueError: no"))
    done = run("scan", pristine("e4b", "all"), *asking)
    assert (done.code, done.commands) == (1, ["bnbfix explain BNB501"]) and "--bf16 may load" in done.words
    done = run("repair", pristine("e4b", "all"), "--out", tmp_path / "out", *asking)
    assert done.code == 1 and done.error.endswith(
        "cannot be repaired for vLLM 0.32.0: vLLM 0.32.0 stops: ValueError: no"
    )
    done = run("scan", pristine("dense31b", "skip"), *asking)
    assert done.code == 1 and done.commands[-1].startswith("bnbfix repair "), "what BNB102 says is a cause"


def test_a_class_that_no_rule_knows_gets_the_engines_answer(run: Cli, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("text", "all")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (source / "config.json").write_text(json.dumps(config))
    assert run("scan", source).code == 3
    done = run("scan", source, "--dry-load", "--python", fake_python(tmp_path))
    assert (done.code, done.err) == (0, "") and "MambaForCausalLM" in done.out and "Loads in vLLM 0.32.0." in done.words
    done = run("scan", source, "--dry-load", "--python", fake_python(tmp_path, error="ValueError: no"))
    assert done.code == 1 and "BNB501 fails" in done.out and "vLLM 0.32.0 stops: ValueError: no" in done.words
    assert "no rules for this model" in done.words and "Repair it" not in done.words
    for format in ("json", "markdown", "github", "sarif", "html"):
        done = run("scan", source, "--dry-load", "--python", fake_python(tmp_path, error="E: no"), "--format", format)
        assert done.code == 1 and "vLLM 0.32.0 stops: E: no" in done.out.replace("&#x27;", "'")


def test_nothing_is_written_that_the_vllm_would_not_load(run: Cli, pristine: Make, tmp_path: Path) -> None:
    python = fake_python(tmp_path, error="ValueError: There is no module or parameter named 'x.y'")
    done = run("repair", pristine("dense31b", "skip"), "--out", tmp_path / "out", "--dry-load", "--python", python)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(
        "error: cannot be repaired for vLLM 0.32.0: of the planned output, x.y: vLLM 0.32.0 stops"
    )
    assert not (tmp_path / "out").exists()


def test_verify_asks_too(run: Cli, pristine: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bnbfix.repair(pristine("dense31b", "skip"), out, "0.32.0", device="cpu")
    assert run("verify", out, "--dry-load", "--python", fake_python(tmp_path)).code == 0
    done = run("verify", out, "--dry-load", "--python", fake_python(tmp_path, requantized=[TOWER]))
    assert done.code == 1 and "silently quantizes it at load time" in done.words


def test_the_target_is_the_vllm_that_is_asked(run: Cli, pristine: Make, tmp_path: Path) -> None:
    python = fake_python(tmp_path)
    assert run("scan", pristine("e4b", "all"), "--vllm", "0.33.0", "--dry-load", "--python", python).code == 0
    done = run("scan", pristine("e4b", "all"), "--vllm", "0.22.1", "--dry-load", "--python", python)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: the target is '0.22.1', but the vLLM that is asked is 0.32.0")
    done = run("scan", pristine("e4b", "all"), "--python", python)
    assert (done.code, done.error) == (2, "error: --python needs --dry-load")
    assert done.commands[0].endswith("--dry-load")


# No answer


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("open(answer, 'w').write('{'); sys.exit()", "is not JSON"),
        ("open(answer, 'w').write('[1]'); sys.exit()", "lacks versions or error"),
        ("open(answer, 'w').write('{\"versions\": {}}'); sys.exit()", "lacks versions or error"),
        ("f = open(answer, 'w'); f.truncate(65_000_000); f.close(); sys.exit()", "above the limit of 64,000,000"),
        ("found['requantized'] = 5", "makes no sense"),
        ("found['quantized'] = 'many'", "makes no sense"),
        ("found['quantized'] = 1e400", "makes no sense"),
        ("os.kill(os.getpid(), 9)", "ended with status -9 and no answer"),
        ("raise MemoryError('too much')", "ended with status 1 and no answer"),
    ],
)
def test_an_answer_that_is_none_is_an_error_in_one_line(
    run: Cli, pristine: Make, tmp_path: Path, does: str, words: str
) -> None:
    done = run("scan", pristine("text", "all"), "--dry-load", "--python", fake_python(tmp_path, does=does))
    assert (done.code, done.out.count("Traceback")) == (2, 0)
    first, *hint = done.err.splitlines()
    assert first.startswith("error: ") and words in first and len(hint) <= 2


def test_a_python_without_vllm(run: Cli, pristine: Make, tmp_path: Path) -> None:
    python = fake_python(tmp_path, versions={"vllm": None, "torch": "2.13.0"})
    done = run("scan", pristine("text", "all"), "--dry-load", "--python", python)
    assert (done.code, done.out) == (2, "") and done.err.startswith(f"error: {python}: has no vLLM\n")


@pytest.mark.parametrize("name", ["no-such-python", "file"])
def test_a_python_that_cannot_be_run(run: Cli, pristine: Make, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a program")
    done = run("scan", pristine("text", "all"), "--dry-load", "--python", tmp_path / name)
    assert (done.code, done.out) == (2, "") and done.err.startswith(f"error: {tmp_path / name}: cannot be run (")


def test_a_vllm_that_takes_too_long_leaves_no_process_behind(pristine: Make, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    does = (
        "import subprocess; child = subprocess.Popen(['sleep', '600']); "
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(600)"
    )
    for seconds in (3, 60):
        if not pids.exists():  # a busy machine may need more than the first limit to start a Python
            with pytest.raises(EngineError, match=f"vLLM gave no answer within {seconds} s"):
                ask(pristine("text", "all"), fake_python(tmp_path, does=does), seconds=seconds)
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    wait_for_end(started)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of a process is read from /proc")
def test_a_vllm_that_allocates_without_end_is_stopped(pristine: Make, tmp_path: Path) -> None:
    python = fake_python(
        tmp_path, does="held = [bytearray(os.urandom(1 << 20)) * 64 for _ in range(8)]; time.sleep(60)"
    )
    with pytest.raises(EngineError, match=r"holds 0\.\d GB of memory, above the limit of 0\.3 GB"):
        ask(pristine("text", "all"), python, max_memory=300_000_000, seconds=60)


def test_what_vllm_is_doing_is_passed_on(pristine: Make, tmp_path: Path) -> None:
    seen: list[str] = []
    does = "[(open(os.environ['BNBFIX_STATUS'], 'w').write(text), time.sleep(0.5)) for text in ('one', 'two')]"
    ask(pristine("text", "all"), fake_python(tmp_path, does=does), status=seen.append)
    assert seen == ["one", "two"]


def test_this_python_is_asked_where_none_is_named(pristine: Make) -> None:
    live = LiveVllm()
    try:
        version = live.installed.version
    except UsageError as e:
        assert str(e) == f"{sys.executable}: has no vLLM"
    else:  # whoever runs the tests next to a vLLM
        assert version


def test_true_asks_the_vllm_that_is_installed_with_bnbfix(pristine: Make) -> None:
    try:
        version = LiveVllm().installed.version
    except UsageError as e:
        with pytest.raises(UsageError) as caught:
            bnbfix.scan(pristine("text", "all"), dry_load=True)
        assert str(caught.value) == str(e)
    else:  # whoever runs the tests next to a vLLM
        assert bnbfix.scan(pristine("text", "all"), dry_load=True).target.name == version


def test_a_process_that_has_ended_holds_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        held = process._resident_bytes(child.pid)
    assert (held > 0) == sys.platform.startswith("linux") and process._resident_bytes(child.pid) == 0


def test_versions_come_from_the_python_that_is_asked(tmp_path: Path) -> None:
    live = LiveVllm(fake_python(tmp_path))
    assert (live.installed.version, live.installed.plugin) == (VERSIONS["vllm"], VERSIONS["vllm-bnb-plugin"])
    newer = LiveVllm(fake_python(tmp_path, versions={"vllm": "0.99.0"})).target
    assert newer.name == "0.99.0" and newer.ranges[0].last == "0.33.0", "judged as the newest that is known"
