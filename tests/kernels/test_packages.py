"""The packages that compute, looked up before they are needed."""

from __future__ import annotations

import sys

import pytest

from bnbfix.errors import UsageError
from bnbfix.kernels.packages import INSTALL, require_packages


def test_a_package_that_is_not_installed_is_a_usage_error_with_what_to_install() -> None:
    with pytest.raises(UsageError, match=r"this repair dequantizes: pip install 'bnbfix\[repair\]'") as caught:
        require_packages("this repair dequantizes", ["json", "no_such_package"])
    assert caught.value.command == INSTALL


def test_packages_are_looked_up_and_not_imported() -> None:
    known = "antigravity"  # which opens a browser where it is imported
    require_packages("this", ["json", known])
    assert known not in sys.modules
