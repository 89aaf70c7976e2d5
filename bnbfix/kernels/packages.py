"""The packages that compute. They come with the extra `repair`; a scan and a repair of config.json do without."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ..errors import UsageError

INSTALL = "pip install 'bnbfix[repair]'"
SMALLER = "It brings torch, in a build for CUDA of several GB; a CPU build that is installed before is enough."
KERNELS = ("torch", "bitsandbytes", "numpy")


def require_packages(what: str, packages: Sequence[str] = KERNELS) -> None:
    """Raises UsageError where one of them is not installed. They are looked up, not imported.

    Args:
        what: What needs them, such as "this repair dequantizes".
    """
    if any(find_spec(name) is None for name in packages):
        hint = SMALLER if find_spec("torch") is None else None
        raise UsageError(f"{what}: {INSTALL}", hint=hint, command=INSTALL)
