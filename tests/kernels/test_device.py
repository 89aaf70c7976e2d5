"""Which device is chosen, and whether torch is asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bnbfix.errors import UsageError
from bnbfix.kernels import device, native
from bnbfix.kernels.device import choose_device, resolve_device

COUNTS = range(4)


@pytest.mark.parametrize("count", COUNTS)
def test_auto_takes_the_first_cuda_device_else_the_cpu(count: int) -> None:
    assert choose_device("auto", count) == ("cuda:0" if count else "cpu")


@pytest.mark.parametrize("count", COUNTS)
def test_cpu_is_always_there(count: int) -> None:
    assert choose_device("cpu", count) == "cpu"


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("number", [None, 0, 1, 2, 3, 10])
def test_a_cuda_device_is_taken_if_it_is_there_and_refused_if_not(number: int | None, count: int) -> None:
    request = "cuda" if number is None else f"cuda:{number}"
    if (number or 0) < count:
        assert choose_device(request, count) == f"cuda:{number or 0}"
        return
    with pytest.raises(UsageError, match=f"device {request}: torch sees {count or 'no'} CUDA device") as caught:
        choose_device(request, count)
    assert caught.value.hint == 'Use device="cpu" (--device cpu); the result is the same.'


@pytest.mark.parametrize("request_", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cpu:0", "mps"])
def test_any_other_device_is_a_usage_error(request_: str) -> None:
    with pytest.raises(UsageError, match="is not one of auto, cpu, cuda, cuda:N"):
        choose_device(request_, 8)


def test_resolve_device_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_driver", lambda: True)
    monkeypatch.setattr(native, "load_library", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(d) for d in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    with pytest.raises(UsageError, match="torch sees 2 CUDA devices"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"


def test_auto_is_the_cpu_where_it_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = []
    for library in (object(), None):
        monkeypatch.setattr(native, "load_library", lambda library=library: library)
        found.append([resolve_device(d) for d in ("auto", "cuda")])
    assert found == [["cpu", "cuda:0"], ["cuda:0", "cuda:0"]]


def test_without_a_driver_auto_is_the_cpu_and_a_device_asked_for_by_name_is_still_refused_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "load_library", lambda: None)
    monkeypatch.setattr(device, "GPU_DRIVERS", ("/dev/no-such-driver",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert (resolve_device("auto"), resolve_device("cuda")) == ("cpu", "cuda:0")
    monkeypatch.setattr(device, "GPU_DRIVERS", ("/dev/null",))
    assert resolve_device("auto") == "cuda:0"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(device, "GPU_DRIVERS", ())
    assert device.gpu_driver(), "another system's drivers are torch's business"


def test_resolving_the_cpu_does_not_import_torch() -> None:
    code = (
        "import sys; from bnbfix.kernels.device import resolve_device; assert resolve_device('cpu') == 'cpu'\n"
        "print(sorted({'torch', 'bitsandbytes', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
