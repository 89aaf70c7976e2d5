"""Turns the answers of a survey into a profile: names become patterns, sizes formulas, equal releases ranges."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from families import Family

from bnbfix.engines.vllm.profiles import (
    EACH,
    LITERAL,
    derive_size,
    evaluate_feature,
    evaluate_size,
    find_numbers,
    find_pattern,
)
from bnbfix.models.family import read_path

MAX_FEATURES = 4  # that one answer may depend on
MAX_CONSTANT = 4  # kernels of convolutions, channels of images
MAX_FACTOR = 32  # bins of a spectrum
UNKNOWN_CLASS = ("are not supported for now", "The checkpoint you are trying to load")  # says vLLM, and transformers
Answer = Any  # JSON
ONLY_SHAPE = object()  # the answer of a point that only tells a size


@dataclass
class Point:
    """One answer about one tensor or parameter of one model."""

    model: int
    layer: int | None
    answer: Answer
    shape: list[int] | None = None


@dataclass
class Models:
    """The surveyed models of a class, by number."""

    configs: list[dict[str, Any]]
    defaults: list[dict[str, Any]]
    features: dict[str, list[str]]
    sizes: dict[int, dict[str, int]] = field(default_factory=dict)
    vectors: dict[tuple[int, int | None], str] = field(default_factory=dict)

    def read(self, model: int, path: str) -> Any:
        value = read_path(self.configs[model], path)
        value = read_path(self.defaults[model], path) if value is None else value
        return derive_size(path, partial(self.read, model)) if value is None else value

    def values(self, p: Point) -> str:
        """The value of each feature, a character each."""
        key = p.model, p.layer
        if key not in self.vectors:
            read = partial(self.read, p.model)
            self.vectors[key] = "".join(evaluate_feature(f, read, p.layer) for f in self.features.values())
        return self.vectors[key]

    def negatives(self, model: int) -> list[str]:
        """The paths of numbers that count from the end."""
        return [path for path in self.configs[model] if type(n := self.configs[model][path]) is int and n < 0]

    def integers(self, model: int) -> dict[str, int]:
        """Every count in a config, by path; lists count by their lengths."""
        if model not in self.sizes:
            sizes = dict(_list_integers(self.configs[model], ""))
            for path in [p for p in sizes if p.endswith("num_attention_heads")]:
                at = path.removesuffix("num_attention_heads")
                for key in ("head_dim", "num_key_value_heads"):
                    if (size := self.read(model, at + key)) is not None:
                        sizes.setdefault(at + key, size)
            self.sizes[model] = sizes
        return self.sizes[model]


def _list_integers(config: dict[str, Any], at: str) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            yield from _list_integers(value, f"{at}{key}.")
        elif type(value) is int and value > 0 and not key.endswith(("_id", "_index")):
            yield at + key, value
        elif isinstance(value, list) and value and type(value[0]) not in (dict, float):
            if key in ("intermediate_size", "image_size", "patch_size"):  # of every layer; of both sides
                if all(size == value[0] for size in value):
                    yield f"{at}{key}{EACH}", value[0]
                continue
            yield at + key, len(value)
            if key.endswith(("channels", "channel_size")):
                yield from ((f"{at}{key}.{i}", size) for i, size in enumerate(value))


def build_profile(
    name: str, family: Family, shapes: list[dict[str, Any]], releases: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The profile of a class, from transformers' answers for its configs, and each release's.

    Of the configs after those that a release was asked about, only the sizes count.
    """
    models = Models([s["config"] for s in shapes], [s["defaults"] for s in shapes], family.features)
    refuses_axial = {r: 1 for r, answers in releases.items() if any(a["error"] for a in answers if "axial" in a)}
    plain = {r: _find_error(a) for r, answers in releases.items() for a in answers if "plain" in a}
    releases = {r: [a for a in answers if not {"axial", "plain"} & set(a)] for r, answers in releases.items()}
    linears = {find_pattern(n): find_pattern(m) for s in shapes for n, m in s["linears"].items()}
    refused = {r: _find_refusal(answers, plain.get(r)) for r, answers in releases.items()}
    known = {r: answers for r, answers in releases.items() if refused[r] is None}
    sized = list(_list_sizes(shapes, len(family.configs)))
    by_release = {r: _describe_release(models, answers, sized) for r, answers in known.items()}
    paths = {path for _, path, *rest in family.features.values() for path in (path, *rest)}
    profile: dict[str, Any] = {
        "schema": 1,
        "architecture": name,
        "model_types": sorted({c["model_type"] for c in models.configs}),
        "known": _merge_releases({r: 1 if w is None else w or None for r, w in refused.items()}, list(releases)),
        "features": family.features,
        "linears": linears,
    }
    stacks = _fit_stacks(models, [(i, s["tensors"]) for i, s in enumerate(shapes)], family.dialects)
    parameters = [(i, m["parameters"]) for answers in known.values() for i, m in enumerate(answers) if not m["error"]]
    built = _fit_stacks(models, parameters, [])
    profile["stacks"] = built | stacks
    if fewer := {stack: count for stack, count in built.items() if count != profile["stacks"][stack]}:
        profile["built"] = fewer  # fewer layers than files have
    if refuses_axial:
        profile["refuses_axial"] = _merge_releases(refuses_axial, list(releases))
    profile |= {
        key: value for key in ("dialects", "unbound", "dtype_read", "inner_names") if (value := getattr(family, key))
    }
    forms = ("transposed_experts", "interleaved_experts", "numbered_experts")
    profile |= {key: 1 for key in forms if getattr(family, key)}
    for part in ("tensors", "parameters", "unknown", "aliases", "refused"):
        keys = sorted({key for described in by_release.values() for key in described[part]})
        profile[part] = {
            key: _merge_releases({r: by_release[r][part].get(key) for r in by_release}, list(releases)) for key in keys
        }
    used = (
        paths
        | {"tie_word_embeddings", "text_config.tie_word_embeddings"}
        | set(_list_paths(profile["tensors"]))
        | set(_list_paths([*profile["stacks"].values(), *built.values()]))
    )
    defaults = {path: read_path(models.defaults[0], path) for path in sorted(used)}
    derived = {path: derive_size(path, partial(read_path, models.defaults[0])) for path in defaults}
    keys = {new: old for new, old in shapes[0]["keys"].items() if new in used}
    if keys:
        profile["keys"] = keys
    profile["defaults"] = {p: v for p, v in defaults.items() if isinstance(v, int) and v != derived[p]}
    return profile


def _find_error(plain: dict[str, Any]) -> str | None:
    """Why a release does not load a class in full precision."""
    return plain["error"] or next((a["error"] for a in plain["answers"] if "error" in a), None)


def _find_refusal(answers: list[dict[str, Any]], plain: str | None) -> str | None:
    """Why a release loads no checkpoint of a class; "" where it does not know the class, None where it loads some.

    `plain` is why it loads none in full precision.
    """
    built = [a for a in answers if not a["error"]]
    if not built:
        unknown = any(words in a["error"] for a in answers for words in UNKNOWN_CLASS)
        return "" if unknown else str(answers[0]["error"]).partition("\n")[0][:200]
    tries = [answer for a in built for answer in a["answers"]]
    first = tries[0].get("error", "")
    if first and all(t.get("error") == first for t in tries):
        return str(first)
    experts = {name for a in built for name, p in a["parameters"].items() if p["experts"] and p["quantized"]}
    filled = {name for t in tries for name in t["fills"]}
    return plain if experts - filled else None  # of experts that no tensor fills there is no checkpoint in 4 bits


def _list_paths(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from (f for f in re.split(r"[*+/]+", value) if f and not f.removeprefix("-").isdigit())
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _list_paths(item)


def _merge_releases(answers: dict[str, Answer], order: list[str]) -> list[list[Any]]:
    """Rows [first release, last release, answer], where neighbours say the same; releases without one have no row."""
    rows: list[list[Any]] = []
    for release in order:
        answer = answers.get(release)
        if rows and answer is not None and rows[-1][2] == answer:
            rows[-1][1] = release
        else:
            rows.append([release, release, answer])
    return [row for row in rows if row[2] is not None]


def _list_sizes(shapes: list[dict[str, Any]], first: int) -> Iterator[tuple[str, Point]]:
    """The tensors of the models from `first` on, by pattern."""
    for number in range(first, len(shapes)):
        for name, shape in shapes[number]["tensors"].items():
            numbers = find_numbers(name)
            yield find_pattern(name), Point(number, numbers[0] if numbers else None, ONLY_SHAPE, shape)


def _describe_release(
    models: Models, answers: list[dict[str, Any]], sized: list[tuple[str, Point]]
) -> dict[str, dict[str, Answer]]:
    tensors: dict[str, list[Point]] = {}
    parameters: dict[str, list[Point]] = {}
    unknown: dict[str, Answer] = {}
    aliases: dict[str, list[tuple[str, bool]]] = {}
    refused: dict[str, list[int]] = {}
    stacks: dict[str, set[str]] = {}
    for number, model in enumerate(answers):
        if model["error"]:
            continue
        found = dict(zip(map(tuple, model["experiments"]), model["answers"], strict=True))
        for name, shape in model["shapes"].items():
            tries = [found[kind, name] for kind in ("quantized", "tensor") if (kind, name) in found]
            if not tries:
                continue  # asked with another model
            numbers = find_numbers(name)
            point = Point(number, numbers[0] if numbers else None, _describe_outcome(name, tries, model), shape)
            tensors.setdefault(find_pattern(name), []).append(point)
        reordered = {name for answer in model["answers"] if answer.get("reordered") for name in answer["fills"]}
        named: dict[tuple[str, int | None], Answer] = {}
        layers: dict[str, set[int]] = {}
        for name, p in model["parameters"].items():
            pattern, numbers = find_pattern(name), find_numbers(name)
            layer = numbers[0] if numbers else None
            answer = {}
            if p["quantized"]:
                answer["quantized"] = 1
            if p["experts"]:
                answer["experts"] = 1
            if name in reordered:
                answer["reordered"] = 1
            if p["prefix"] is not None and p["prefix"] != name.rpartition(".")[0]:
                answer["module"] = find_pattern(p["prefix"])
            named[pattern, layer] = answer
            if layer is not None:
                layers.setdefault(pattern.split("*")[0], set()).add(layer)
            stacks.setdefault(pattern, set())
        model["named"], model["layers"] = named, layers
        for what, answer in zip(model["experiments"], model["answers"], strict=True):
            if what[0] == "unknown":
                key = f"{find_pattern(what[1])}|{what[2]}"
                unknown[key] = "error" in answer or bool(answer["fills"])
            elif what[0] == "beyond":
                unknown[f"{find_pattern(what[1])}.*|beyond"] = "error" in answer
            elif what[0] == "alias":
                _, theirs, ours, name = what
                wanted = found.get(("quantized", name), {"fills": []})["fills"] or found["tensor", name]["fills"]
                dropped = "error" not in found["tensor", name] and "error" not in answer and not answer["fills"]
                if wanted or dropped:  # where the release drops the tensor, it may drop it by this name as well
                    aliases.setdefault(f"{theirs}|{ours}", []).append((name, answer["fills"] == wanted))
            elif what[0].startswith("wrong") and "error" not in answer:
                if answer["fills"]:
                    refused.setdefault(find_pattern(what[1]), []).append(what[2])
    for pattern, point in sized:
        if pattern in tensors:
            tensors[pattern].append(point)
    for pattern in stacks:
        points = parameters.setdefault(pattern, [])
        for number, model in enumerate(answers):
            if model["error"]:
                continue
            if "*" not in pattern:
                points.append(Point(number, None, model["named"].get((pattern, None))))
            else:
                here = model["layers"].get(pattern.split("*")[0], ())
                points += [Point(number, i, model["named"].get((pattern, i))) for i in sorted(here)]
                if not here:
                    points.append(Point(number, 0, None))
    out: dict[str, dict[str, Answer]] = {
        "tensors": {
            pattern: _fit_literal(points) if LITERAL in pattern else fit_cases(models, points)
            for pattern, points in tensors.items()
        },
        "parameters": {pattern: fit_cases(models, points) for pattern, points in parameters.items()},
        "unknown": _shorten_unknown(unknown),
        "aliases": {},
        "refused": {pattern: sorted(set(dims)) for pattern, dims in refused.items()},
    }
    for key, tries in aliases.items():
        by_name: dict[str, bool] = {}
        for name, ok in tries:
            by_name[name] = by_name.get(name, False) or ok
        out["aliases"][key] = int(all(by_name.values()))
    return out


def _describe_outcome(name: str, tries: list[dict[str, Any]], model: dict[str, Any]) -> Answer:
    """What becomes of a tensor: {parameter: parts}, "ignored" or "refused"."""
    for answer in tries:
        if answer["fills"]:  # buffers are filled as well, and needed by nobody
            fills = [p for p in answer["fills"] if p in model["parameters"]]
            parts: dict[str, set[str]] = {}
            for parameter, part in answer["parts"]:
                parts.setdefault(parameter, set()).add(part)
            numbers = find_numbers(name)
            return {find_pattern(p): sorted(_part_pattern(part, numbers) for part in parts.get(p, {""})) for p in fills}
    return "refused" if all("error" in answer for answer in tries) else "ignored"


def _part_pattern(part: str, numbers: tuple[int, ...]) -> str:
    """A part of the experts' parameter, with `*` for the expert's number."""
    words = part.split(",")
    return ",".join("*" if len(numbers) > 1 and w == str(numbers[-1]) and len(words) > 1 else w for w in words)


def _shorten_unknown(unknown: dict[str, bool]) -> dict[str, Answer]:
    """Refused or not, by module and name; a module of which all is as in the one around it is left out."""
    modules: dict[str, dict[str, int]] = {}
    for key, refused in sorted(unknown.items(), key=lambda item: item[0].partition("|")[0].count(".")):
        module, what = key.split("|")
        modules.setdefault(module, {})[what] = int(refused)
    out = {}
    for module, answers in modules.items():
        around = module
        while around:
            around = around.rpartition(".")[0]
            if around in out:
                break
        inherited = out.get(around, {}) if module else {}
        if any(inherited.get(what) != refused for what, refused in answers.items()):
            out[module] = dict(inherited) | answers
    return out


def fit_cases(models: Models, points: list[Point]) -> Answer:
    """The answer, or {by, cases} where it depends on features: as few of them as tell the answers apart."""
    names, fallback = list(models.features), None
    found = {(p.model, models.values(p), repr(p.answer), repr(p.shape)): p for p in reversed(points)}
    points = list(reversed(found.values()))  # of layers that are alike, one
    for count in range(min(MAX_FEATURES, len(names)) + 1):
        for chosen in itertools.combinations(range(len(names)), count):
            groups: dict[str, list[Point]] = {}
            for p in points:
                groups.setdefault("".join(models.values(p)[i] for i in chosen), []).append(p)
            seen = {v: [p.answer for p in group if p.answer is not ONLY_SHAPE] for v, group in groups.items()}
            if any(answer != answers[0] for answers in seen.values() for answer in answers):
                continue
            cases = {v: _with_shape(models, groups[v], answers[0]) for v, answers in seen.items() if answers}
            made = next(iter(cases.values())) if not chosen else {"by": [names[i] for i in chosen], "cases": cases}
            if not any(isinstance(c, dict) and "shape" in c and None in c["shape"] for c in cases.values()):
                return made
            fallback = fallback or made
    assert fallback is not None, (points[0], "no features tell the answers apart")
    return fallback


def _fit_literal(points: list[Point]) -> Answer:
    """The answer about a tensor that every model of the class has in one shape."""
    first = points[0]
    assert first.shape is not None and all(p.shape == first.shape for p in points), first
    assert all(p.answer in (first.answer, ONLY_SHAPE) for p in points), first
    if not isinstance(first.answer, dict):
        return first.answer
    return {"fills": first.answer, "shape": list(map(str, first.shape))}


def _with_shape(models: Models, group: list[Point], answer: Answer) -> Answer:
    first = group[0].shape
    if first is None or not isinstance(answer, dict):
        return answer
    if any(len(p.shape or ()) != len(first) for p in group):
        return {"fills": answer, "shape": [None]}
    return {"fills": answer, "shape": [_fit_size(models, group, i) for i in range(len(first))]}


def _fit_size(models: Models, group: list[Point], dim: int) -> str | None:
    """The simplest formula that gives a dimension in every model of the group."""
    wanted: dict[int, int] = {}
    for p in group:
        assert p.shape is not None
        if wanted.setdefault(p.model, p.shape[dim]) != p.shape[dim]:
            return None
    return fit_formula(models, wanted)


def fit_formula(models: Models, wanted: dict[int, int]) -> str | None:
    """The simplest formula whose values are the wanted ones, by model; None where none is, or where it is not certain.

    A size that is the same in every model counts as a constant only when it is small: a list of sizes may be behind it.
    """
    first = min(wanted)
    constant = str(wanted[first])

    def fits(formula: str) -> bool:
        return all(evaluate_size(formula, partial(models.read, model)) == n for model, n in wanted.items())

    for candidates in _list_formulas(models.integers(first), models.negatives(first), wanted[first]):
        if found := [f for f in candidates if fits(f)]:
            if fits(constant):
                return constant if wanted[first] <= MAX_CONSTANT else None
            return min(found, key=lambda f: (_count_sections(f), f))
    return constant if fits(constant) and wanted[first] <= MAX_CONSTANT else None


def _count_sections(formula: str) -> int:
    return len({path.rpartition(".")[0] for path in re.split(r"[*+/]+", formula) if not path.isdigit()})


def _list_formulas(sizes: dict[str, int], negatives: list[str], wanted: int) -> Iterator[list[str]]:
    """Formulas that have the wanted value in one model, simplest first."""
    counts = re.compile(r"(num_hidden_layers|depth|experts)$")
    yield [p for p, v in sizes.items() if v == wanted and counts.search(p)]
    yield [f"{p}+{n}+1" for n in negatives for p, v in sizes.items() if counts.search(p) and v >= wanted]
    yield [p for p, v in sizes.items() if v == wanted and not p.endswith("types")]
    yield [f"{k}*{p}" for p, v in sizes.items() for k in (2, 3, 4) if k * v == wanted]
    yield [f"{p}/{k}" for p, v in sizes.items() for k in (2, 4) if v == k * wanted]
    pairs = list(itertools.combinations_with_replacement(sizes, 2))
    yield [f"{a}*{b}" for a, b in pairs if sizes[a] * sizes[b] == wanted]
    yield [f"{k}*{a}*{b}" for a, b in pairs for k in (2, 3, 4) if k * sizes[a] * sizes[b] == wanted]
    yield [f"{a}*{b}/{k}" for a, b in pairs for k in (2, 4, 8, 16) if sizes[a] * sizes[b] == k * wanted]
    squares = [
        (a, b) for a in sizes for b in sizes if sizes[a] * sizes[b] ** 2 and wanted % (sizes[a] * sizes[b] ** 2) == 0
    ]
    yield [f"{k}*{a}*{b}*{b}" for a, b in squares for k in (1, 2, 3) if k * sizes[a] * sizes[b] ** 2 == wanted]
    yield [f"{k}*{a}*{b}*{a}*{b}" for a, b in pairs for k in (1, 3) if k * (sizes[a] * sizes[b]) ** 2 == wanted]
    yield [f"{a}*{b}*{c}" for (a, b) in pairs for c in sizes if sizes[a] * sizes[b] * sizes[c] == wanted]
    sides = [path for path in sizes if path.removesuffix(EACH).endswith("size")]
    patches = [(a, b, sizes[a] // sizes[b]) for a in sides for b in sides]
    yield [f"{a}//{b}*{a}//{b}" for a, b, side in patches if side**2 == wanted]
    yield [f"{a}//{b}*{a}//{b}+1" for a, b, side in patches if side**2 + 1 == wanted]  # and one for the class
    yield [f"{wanted // v}*{p}" for p, v in sizes.items() if wanted % v == 0 and 4 < wanted // v <= MAX_FACTOR]
    yield [
        f"{a}*{c}+2*{b}*{c}"
        for a in sizes
        for b in sizes
        for c in sizes
        if (sizes[a] + 2 * sizes[b]) * sizes[c] == wanted
    ]
    dims = [p for p in sizes if p.endswith("head_dim")]  # of linear attention: q and k, and v
    counts_of_heads = [p for p in sizes if p.endswith("heads")]
    yield [
        f"2*{a}*{b}+{c}*{d}"
        for a, c in itertools.product(dims, dims)
        for b, d in itertools.product(counts_of_heads, counts_of_heads)
        if 2 * sizes[a] * sizes[b] + sizes[c] * sizes[d] == wanted
    ]
    heads = [p for p in sizes if p.endswith("num_attention_heads")]
    yield [f"{a}//{b}" for a in sizes for b in heads if a.endswith("hidden_size") and sizes[a] == wanted * sizes[b]]
    yield [f"{p}+-1" for p, v in sizes.items() if v == wanted + 1]


def _fit_stacks(
    models: Models, lists: Iterable[tuple[int, dict[str, Any]]], dialects: list[tuple[str, str]]
) -> dict[str, str | list[int] | None]:
    """How many layers each stack has, by the pattern of its name, out of models' names.

    A list where they are not numbered from 0 on, such as the linear modules of a projector.
    """
    found: dict[str, dict[int, set[int]]] = {}
    for model, names in lists:
        others = {
            theirs + name[len(ours) :]: shape
            for ours, theirs in dialects
            for name, shape in names.items()
            if name.startswith(ours) and not name.startswith(theirs)
        }
        for name, shape in (names | others).items():
            if re.search(r"\.experts\.(gate_up_proj|down_proj)$", name) and len(shape) == 3:
                for prefix in ("experts", "moe.experts"):
                    stack = find_pattern(name.rpartition(".experts.")[0]) + "." + prefix
                    found.setdefault(stack, {}).setdefault(model, set()).update(range(shape[0]))
            parts = [] if LITERAL in name else name.split(".")
            for at, part in enumerate(parts):
                if part.isdigit():
                    stack = find_pattern(".".join(parts[:at]))
                    found.setdefault(stack, {}).setdefault(model, set()).add(int(part))
    out: dict[str, str | list[int] | None] = {}
    for stack, numbers in sorted(found.items()):
        same = set.union(*numbers.values())
        if all(n == same for n in numbers.values()) and same != set(range(len(same))):
            out[stack] = sorted(same)
        else:
            out[stack] = fit_formula(models, {model: max(n) + 1 for model, n in numbers.items()})
    return out
