"""Every error survives being pickled: a ProcessPoolExecutor sends it to the parent process that way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import bnbfix
from bnbfix import errors
from bnbfix.errors import BnbfixError, FindingsRemain
from tests.support.build import Make


def subclasses(of: type[BnbfixError]) -> Iterator[type[BnbfixError]]:
    yield of
    for below in of.__subclasses__():
        yield from subclasses(below)


ALL = sorted(set(subclasses(BnbfixError)), key=lambda e: e.__name__)


def test_every_error_of_the_module_is_tested() -> None:
    assert {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, BnbfixError)} <= set(ALL)
    assert len(ALL) >= 12


@pytest.mark.parametrize("way", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("where", [None, "config.json"])
@pytest.mark.parametrize("error", ALL)
def test_an_error_is_the_same_after_a_round_trip(
    error: type[BnbfixError], where: str | None, way: Callable[[BnbfixError], BnbfixError]
) -> None:
    old = error("is broken", where=where, hint="Fix it.")
    if isinstance(old, FindingsRemain):
        old.findings = ("a", "b")
    new = way(old)
    assert type(new) is error and str(new) == str(old) == (f"{where}: is broken" if where else "is broken")
    assert (new.where, new.hint, new.exit_code, vars(new)) == (where, "Fix it.", old.exit_code, vars(old))


def test_findings_come_back_from_another_process(checkpoint: Make) -> None:
    folder: Path = checkpoint("dense31b", "partial")
    with pytest.raises(FindingsRemain) as caught:
        bnbfix.check_before_upload(folder, "portable")
    with ProcessPoolExecutor(1) as pool, pytest.raises(FindingsRemain) as sent:
        pool.submit(bnbfix.check_before_upload, folder, "portable").result(timeout=120)
    assert str(sent.value) == str(caught.value)
    assert sent.value.findings == caught.value.findings != ()
    assert sent.value.hint == caught.value.hint
