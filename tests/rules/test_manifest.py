"""A tensor lost, renamed, added or reshaped is never said to load, unless the release needs or knows nothing of it.

Sizes that the profiles are not certain of (None) are not checked.
"""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnbfix
from bnbfix.checkpoint.checkpoint import Checkpoint, rename_weights
from bnbfix.engines.engine import Place
from bnbfix.engines.targets import find_range, resolve_target
from bnbfix.engines.vllm.recorded import expect
from bnbfix.engines.vllm.releases import ranges
from bnbfix.models.inspection import inspect_checkpoint
from bnbfix.rules.rule import Reading, Severity, make_cases
from bnbfix.rules.scan import scan_checkpoint
from tests.support.build import Make, opened
from tests.support.mutations import MUTATIONS, delete_weight, rename_weight, reshape_weight

LOADING = {"dense31b": "0.32.0", "e4b": "0.22.1", "unified12b": "0.27.1", "moe26b": "0.27.1", "text": "0.32.0"}


@pytest.fixture(scope="module")
def loading(pristine: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Checkpoints that load in their releases."""
    out = {}
    for family, release in LOADING.items():
        source, repaired = pristine(family, "skip"), tmp_path_factory.mktemp("loading") / family
        written = bnbfix.repair(source, repaired, release, device="cpu").written
        out[family] = opened(repaired if written else source)
    return out


def place_of(checkpoint: Checkpoint, release: str, name: str) -> Place:
    """Where the release puts the tensor."""
    row = find_range(release)
    assert row is not None
    expectation = expect(inspect_checkpoint(checkpoint).model, row)
    assert expectation is not None
    return expectation.place(name) or Place()


@pytest.mark.parametrize("family", LOADING)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), mutate=st.sampled_from(MUTATIONS))
def test_a_mutation_is_never_said_to_load(
    family: str, loading: dict[str, Checkpoint], seed: int, mutate: object
) -> None:
    release = LOADING[family]
    before, target = loading[family], resolve_target(release)
    assert scan_checkpoint(before, target).verdict == Severity.LOADS
    words, after = mutate(before, random.Random(seed))  # type: ignore[operator]
    said = scan_checkpoint(after, target).verdict
    if mutate in (delete_weight, rename_weight):
        (lost,) = set(before.weights) - set(after.weights)
        assert said > Severity.DEGRADED or not place_of(before, release, lost).fills, words
    elif mutate is reshape_weight:
        (changed,) = (n for n, w in after.weights.items() if w.shape != before.weights[n].shape)
        shape = place_of(before, release, changed).shape
        assert said == Severity.FAILS or shape is None or None in shape, words
    else:
        (new,) = set(after.weights) - set(before.weights)
        assert said == Severity.FAILS or not place_of(after, release, new).refused, words


def beyond(checkpoint: Checkpoint, choose: random.Random) -> tuple[str, Checkpoint]:
    """A weight moves to a layer that config.json does not have."""
    name = choose.choice([n for n in checkpoint.weights if ".layers." in n])
    new = re.sub(r"\.layers\.\d+\.", ".layers.77.", name)
    return f"move {name} to {new}", rename_weights(checkpoint, {name: new})


@pytest.mark.parametrize("family", LOADING)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), mutate=st.sampled_from((*MUTATIONS, beyond)))
def test_releases_that_share_a_reading_read_alike(
    family: str, loading: dict[str, Checkpoint], seed: int, mutate: object
) -> None:
    words, checkpoint = mutate(loading[family], random.Random(seed))  # type: ignore[operator]
    inspection = inspect_checkpoint(checkpoint)
    cases = list(make_cases(inspection, ranges(), resolve_target("portable"), None))
    for case in cases:
        alone = Reading(inspection, case.expectation)
        assert (case.load, case.params) == (alone.load, alone.params), (words, case.release.name)
