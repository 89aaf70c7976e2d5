"""The Python API: its names, its types, its silence, and the errors that it promises."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pickle
import pkgutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.errors import BnbfixError
from bnbfix.hub.push import Destination
from bnbfix.verifier.publish import push_output
from bnbfix.writer.write import WriteOptions, write_plan
from tests.support.build import Make
from tests.support.command_line import install_vllm

RESULTS = [
    "Edit",
    "Finding",
    "Plan",
    "Problem",
    "ReleaseRange",
    "ReleaseVerdict",
    "RepairResult",
    "ScanResult",
    "Target",
    "VerifyResult",
]
ERRORS = sorted(n for n in bnbfix.__all__ if isinstance(getattr(bnbfix, n), type) and n.endswith("Error"))
FUNCTIONS = [name for name in bnbfix.__all__ if name.islower()]


@pytest.mark.parametrize("name", bnbfix.__all__)
def test_a_public_name_is_there(name: str) -> None:
    found = getattr(bnbfix, name)
    assert found.__name__ == name
    assert found.__module__.startswith("bnbfix.")
    assert inspect.getdoc(found), "and says what it is"
    assert name in dir(bnbfix)


def test_public_names_are_sorted_and_known_to_the_type_checker() -> None:
    assert list(bnbfix.__all__) == sorted(bnbfix.__all__)
    source = inspect.getsource(bnbfix)
    block = source[source.index("if TYPE_CHECKING:") : source.index("__all__")]
    assert all(name in block for name in bnbfix.__all__)
    assert set(RESULTS) | set(FUNCTIONS) <= set(bnbfix.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'bnbfix' has no attribute 'nonsense'"):
        bnbfix.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        from bnbfix import nonsense  # noqa: F401


def test_modules_do_not_hide_the_functions() -> None:
    for module in pkgutil.walk_packages(bnbfix.__path__, "bnbfix."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert all(inspect.isfunction(getattr(bnbfix, name)) for name in FUNCTIONS)


def test_importing_what_is_run_with_python_m_runs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("bnbfix.__main__", "bnbfix.cli.pre_commit"):
        assert importlib.reload(importlib.import_module(name)).main
    assert capfd.readouterr() == ("", "")


def test_star_import_brings_every_name() -> None:
    code = "from bnbfix import *\nprint(sorted(n for n in dir() if not n.startswith('__')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{sorted(bnbfix.__all__)}\n"


def test_the_version_is_that_of_the_distribution() -> None:
    assert bnbfix.__version__ == metadata.version("bnbfix")


def test_the_package_is_typed() -> None:
    assert resources.files("bnbfix").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_annotated_and_say_what_they_raise(name: str) -> None:
    function = getattr(bnbfix, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert "Raises" in (inspect.getdoc(function) or "") or not signature.parameters


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_frozen_dataclasses(name: str) -> None:
    kind = getattr(bnbfix, name)
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    mutable = ("list[", "dict[", "set[")
    assert not any(str(f.type).startswith(mutable) for f in dataclasses.fields(kind))


def test_a_result_cannot_be_changed(pristine: Make) -> None:
    result = bnbfix.scan(pristine("dense31b", "partial", shards=2), "portable")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.model = "another"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.findings[0].message = "another"  # type: ignore[misc]


def test_the_same_scan_twice_gives_equal_results(pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    assert bnbfix.scan(source, "portable") == bnbfix.scan(str(source), vllm="portable")
    assert bnbfix.scan(source, "portable") != bnbfix.scan(source, "0.32.0")


def test_all_four_functions_are_silent(
    pristine: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    source, out = pristine("dense31b", "partial", shards=2), tmp_path / "out"
    capfd.readouterr()
    scan = bnbfix.scan(source, vllm="portable")
    plan = bnbfix.plan_repair(source, vllm="portable")
    result = bnbfix.repair(source, out, vllm="portable", device="cpu")
    verified = bnbfix.verify(out, source)
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in recwarn] == []
    kinds = (bnbfix.ScanResult, bnbfix.Plan, bnbfix.RepairResult, bnbfix.VerifyResult)
    assert all(isinstance(r, kind) for r, kind in zip((scan, plan, result, verified), kinds, strict=True))
    assert (scan.ok, plan.nothing_to_do, result.written, verified.ok) == (False, False, True, True)


def test_errors_are_silent_too(pristine: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = pristine("dense31b", "skip")
    capfd.readouterr()
    for call in (
        lambda: bnbfix.scan(tmp_path / "nowhere"),
        lambda: bnbfix.scan(source, "0.1.0"),
        lambda: bnbfix.plan_repair(pristine("moe26b", "all"), "0.22.1"),
        lambda: bnbfix.repair(source, source / "inside", "portable"),
        lambda: bnbfix.verify(source),
    ):
        with pytest.raises(BnbfixError):
            call()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_repair_chooses_its_device_itself(pristine: Make, tmp_path: Path, device: str) -> None:
    source = pristine("dense31b", "partial", shards=2)
    assert bnbfix.repair(source, tmp_path / "out", "portable", device=device).written
    assert bnbfix.verify(tmp_path / "out", source).ok


def test_a_repair_needs_no_device_to_be_named(pristine: Make, tmp_path: Path) -> None:
    assert bnbfix.repair(pristine("dense31b", "partial", shards=2), tmp_path / "out", vllm="portable").written


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_a_usage_error(pristine: Make, tmp_path: Path, device: str) -> None:
    with pytest.raises(bnbfix.UsageError, match=rf"^device .*{device}"):
        bnbfix.repair(pristine("dense31b", "partial", shards=2), tmp_path / "out", "portable", device=device)
    assert list(tmp_path.iterdir()) == []


def test_paths_may_be_strings_and_relative(pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pristine("dense31b", "skip")
    monkeypatch.chdir(source.parent)
    assert bnbfix.scan(source.name, "portable").model == source.name
    monkeypatch.chdir(tmp_path)
    bnbfix.repair(str(source), "out", "portable", device="cpu")
    assert bnbfix.verify("out", str(source)).ok


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partial_groups": "drop"}, "partial_groups is 'drop', not dequantize or quantize"),
        ({"max_shard_size": 0}, "max_shard_size is 0, not a number of bytes"),
        ({"bf16": True, "max_shard_size": -1}, "max_shard_size is -1, not a number of bytes"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(
    pristine: Make, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    source = pristine("text", "single", shards=2)
    with pytest.raises(bnbfix.UsageError, match=words):
        bnbfix.plan_repair(source, "0.32.0", **options)
    with pytest.raises(bnbfix.UsageError, match=words):
        bnbfix.repair(source, tmp_path / "out", "0.32.0", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_shard_size_gives_every_tensor_its_own_shard(pristine: Make) -> None:
    plan = bnbfix.plan_repair(pristine("text", "single", shards=2), "0.32.0", bf16=True, max_shard_size=1)
    assert {len(s.tensors) for s in plan.shards} == {1}
    assert len({s.name for s in plan.shards}) == len(plan.shards) > 50


@pytest.mark.parametrize(
    "options", [{"bf16": True, "max_shard_size": 200_000}, {"partial_groups": "quantize"}], ids=str
)
def test_a_plan_with_options_is_what_a_repair_with_them_writes(
    pristine: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = pristine("e4b", "partial")
    plan = bnbfix.plan_repair(source, "0.32.0", **options)
    result = bnbfix.repair(source, tmp_path / "out", "0.32.0", device="cpu", **options)
    assert result.plan.edits == plan.edits != bnbfix.plan_repair(source, "0.32.0").edits
    assert {s.name: s.size for s in plan.shards} == {
        p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")
    }
    assert bnbfix.verify(tmp_path / "out", source).ok


EXIT_CODES = {
    "BnbfixError": 2,
    "UsageError": 2,
    "InputError": 2,
    "HeaderError": 2,
    "QuantStateError": 2,
    "NotApplicable": 3,
    "Unrepairable": 1,
    "VerifyError": 1,
    "OutputError": 2,
    "HubError": 2,
}


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_every_error_has_its_exit_code_and_is_a_bnbfix_error(name: str, code: int) -> None:
    kind = getattr(bnbfix, name)
    assert kind.exit_code == code and issubclass(kind, BnbfixError)
    error = kind("went wrong", where="a file", hint="do this")
    assert (str(error), error.where, error.hint) == ("a file: went wrong", "a file", "do this")
    assert str(kind("went wrong")) == "went wrong"


def test_every_public_error_is_in_the_table_above() -> None:
    assert set(ERRORS) <= set(EXIT_CODES) | {"EngineError"}


def test_a_damaged_header_and_a_damaged_quant_state_are_input_errors() -> None:
    assert issubclass(bnbfix.HeaderError, bnbfix.InputError)
    assert issubclass(bnbfix.QuantStateError, bnbfix.InputError)


@pytest.mark.parametrize(
    ("family", "quant", "target", "kind"),
    [
        ("dense31b", "bf16", "portable", "NotApplicable"),
        ("dense31b", "skip", "0.1", "UsageError"),
        ("moe26b", "all", "0.22.1", "Unrepairable"),
        ("unified12b", "all", "0.22.1", "Unrepairable"),
    ],
)
def test_plan_repair_raises_what_it_promises(pristine: Make, family: str, quant: str, target: str, kind: str) -> None:
    with pytest.raises(getattr(bnbfix, kind)) as caught:
        bnbfix.plan_repair(pristine(family, quant), target)
    assert type(caught.value).__name__ == kind


def test_a_damaged_quant_state_is_a_finding_of_a_scan_and_an_error_of_a_plan(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "single")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data.replace(b'"blocksize": 64', b'"blocksize": 32', 1))
    result = bnbfix.scan(source, "0.32.0")
    assert not result.ok and result.verdict == "fails"
    assert next(f.code.value for f in result.findings if f.counts) == "BNB201"
    with pytest.raises(bnbfix.QuantStateError, match="absmax is F32"):
        bnbfix.plan_repair(source, "0.32.0")


def test_enums_read_well_and_results_go_into_json(pristine: Make) -> None:
    result = bnbfix.scan(pristine("dense31b", "partial", shards=2), "portable")
    finding = result.findings[0]
    assert isinstance(finding.code, bnbfix.Code) and isinstance(finding.severity, bnbfix.Severity)
    assert str(finding.severity) == f"{finding.severity}" == "fails" and finding.code == "BNB102"
    assert json.dumps([finding.code, finding.severity, result.verdict]) == '["BNB102", "fails", "fails"]'
    assert [r.release for r in result.releases] == list(result.target.ranges)
    assert pickle.loads(pickle.dumps(finding)) == finding


def test_a_scan_result_is_the_json_document(pristine: Make) -> None:
    result = bnbfix.scan(pristine("dense31b", "partial", shards=2), "portable")
    doc = result.to_dict()
    assert json.loads(json.dumps(doc)) == doc
    assert type(doc["verdict"]) is str and type(doc["findings"][0]["severity"]) is str
    assert (doc["schema"], doc["verdict"], len(doc["findings"])) == (1, "fails", len(result.findings))


@pytest.mark.parametrize("vllm", [0.32, 1, ("0.32.0",), 0])
def test_a_release_that_is_not_a_string_is_a_usage_error(pristine: Make, tmp_path: Path, vllm: Any) -> None:
    source = pristine("e4b", "all")
    for call in (
        lambda: bnbfix.scan(source, vllm),
        lambda: bnbfix.plan_repair(source, vllm),
        lambda: bnbfix.repair(source, tmp_path / "out", vllm),
        lambda: bnbfix.check_before_upload(source, vllm),
    ):
        with pytest.raises(bnbfix.UsageError) as caught:
            call()
        assert str(caught.value) == f"the vLLM release is {vllm!r}, not a string"


def test_verify_needs_a_source_for_a_revision(tmp_path: Path) -> None:
    with pytest.raises(bnbfix.UsageError, match="a revision needs a source on the Hub"):
        bnbfix.verify(tmp_path, revision="main")


def test_a_plan_is_written_in_a_second_step(pristine: Make, tmp_path: Path) -> None:
    source, out = pristine("dense31b", "skip"), tmp_path / "out"
    plan = bnbfix.plan_repair(source, "portable", out=out)
    assert not out.exists()
    result = write_plan(plan, out, WriteOptions(device="cpu"))
    assert result.plan is plan and bnbfix.verify(out, source).ok
    with pytest.raises(bnbfix.UsageError, match="exists and is not empty"):
        bnbfix.plan_repair(source, "portable", out=out)
    assert bnbfix.plan_repair(source, "portable", out=out, overwrite=True).edits == plan.edits


def test_a_plan_and_a_result_are_described_in_a_line(pristine: Make, tmp_path: Path) -> None:
    source, out = pristine("e4b", "skip"), tmp_path / "out"
    plan = bnbfix.plan_repair(source, "0.32.0")
    assert sum(len(s.tensors) for s in plan.shards) > 200
    result = bnbfix.repair(source, out, "0.32.0", device="cpu")
    scanned = bnbfix.scan(source, "0.32.0")
    for described in (repr(plan), repr(result), repr(scanned), repr(scanned.findings[0])):
        assert len(described) < 300 + len(str(source)) and "\n" not in described
    assert str(source) in repr(plan) and str(out) in repr(result)
    assert str(source) in repr(scanned) and all(f.code.value in repr(scanned) for f in scanned.findings)
    assert len(repr(bnbfix.repair(out, tmp_path / "again", "0.32.0"))) < 300


def test_a_push_verifies_first(pristine: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bnbfix.repair(pristine("dense31b", "skip"), out, "portable", device="cpu")
    (out / "config.json").write_text("{}")
    with pytest.raises(bnbfix.VerifyError, match="nothing was pushed"):
        push_output(out, Destination("org/name", False, False, None))


def test_many_scans_go_on_after_an_error(pristine: Make, tmp_path: Path) -> None:
    good, bad = pristine("e4b", "all"), pristine("dense31b", "partial")
    found = dict(bnbfix.scan_many([good, tmp_path, str(bad)], "0.32.0"))
    assert list(found) == [good, tmp_path, str(bad)]
    assert isinstance(found[tmp_path], bnbfix.InputError)
    assert found[good] == bnbfix.scan(good, "0.32.0") and found[str(bad)] == bnbfix.scan(bad, "0.32.0")
    with pytest.raises(bnbfix.UsageError, match=r"0\.1\.0"):
        next(bnbfix.scan_many([good], "0.1.0"))


def test_a_code_is_explained() -> None:
    found = bnbfix.explain("BNB107")
    assert found == bnbfix.explain(bnbfix.Code.QUANTIZED_PIXEL_PROJECTION)
    assert found.to_dict().keys() == {"title", "severity", "why", "fix", "upstream"}
    assert found.severity == "degraded"
    with pytest.raises(bnbfix.UsageError, match="'BNB999' is not a finding's code"):
        bnbfix.explain("BNB999")


def test_the_releases_are_the_table() -> None:
    first, *_, last = bnbfix.releases()
    assert (first.first, last.last) == ("0.19.0", "0.33.0")


def test_a_notebook_shows_a_scan(pristine: Make) -> None:
    result = bnbfix.scan(pristine("dense31b", "partial", shards=2), "portable")
    frame, text = result._repr_html_(), result._repr_markdown_()
    assert frame is not None and frame.startswith("<iframe srcdoc=") and frame.count("<") == 2
    assert "BNB103" in frame and "&lt;!DOCTYPE html&gt;" in frame
    assert text is not None and text.startswith("## bnbfix: ") and "### BNB103" in text


def test_documents_say_what_made_them(pristine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pristine("e4b", "all")
    head = {"schema": 1, "bnbfix": bnbfix.__version__, "installed": None, "commit": None, "warning": None}
    install_vllm(monkeypatch, None)
    for document in (bnbfix.scan(source, "0.32.0").to_dict(), bnbfix.plan_repair(source, "0.32.0").to_dict()):
        assert dict(list(document.items())[:5]) == head
    install_vllm(monkeypatch, "0.34.0", "0.0.3")
    document = bnbfix.scan(source).to_dict()
    assert document["installed"] == {"vllm": "0.34.0", "plugin": "0.0.3"}
    assert document["target"] == "0.34.0" and "newer than this bnbfix" in document["warning"]
