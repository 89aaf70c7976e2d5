"""System calls that Python lacks or leaves raw. Each reports in its result that the system has no such call."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from ..errors import InputError

FICLONE = 0x40049409  # linux/fs.h
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
# One write: ext4 of Linux 6.18 takes seven times as long for the same bytes in writes of 4 MB.
WRITE_BYTES = 1 << 20
READ_BYTES = 4 << 20  # one read, where the kernel does not copy
# Errors of a kernel or a file system that cannot copy between two files that can be read and written.
CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ENOTTY, errno.ETXTBSY}


def clone(source: int, target: int) -> bool:
    """Makes `target` share the bytes of `source` (file descriptors) on disk. False where the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as e:
        if e.errno in CANNOT:
            return False
        raise
    return True


def copy(source: int, offset: int, target: int, at: int, length: int, where: str) -> bool:
    """Copies bytes between two files. True when the kernel copied all of them; False when they were read and written.

    Raises InputError when the source ends before.
    """
    kernel: Callable[..., int] | None = getattr(os, "copy_file_range", None)
    while length:
        done = 0
        if kernel is not None:
            # Whatever is wrong, reading and writing reports which of the two files it is.
            with contextlib.suppress(OSError):
                done = kernel(source, target, length, offset, at)
            if done == 0:  # refused; or the end, or a file system that only claims it (Linux before 5.12, on /proc)
                kernel = None
        if kernel is None:
            try:
                data = os.pread(source, min(length, READ_BYTES), offset)
            except OSError as e:
                raise InputError(f"cannot be read at byte {offset:,} ({e.strerror})", where=where) from e
            if not data:
                raise InputError(f"ended at byte {offset:,} while it was being read", where=where)
            write_all(target, data, at)
            done = len(data)
        offset, at, length = offset + done, at + done, length - done
    return kernel is not None


def write_all(fd: int, data: bytes | memoryview, at: int) -> None:
    """Writes all bytes at an offset, however short the writes of the system are."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view[:WRITE_BYTES], at)
        at += done
        view = view[done:]


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Asks the kernel to begin writing a range to disk, which keeps the last fsync short. The kernel may ignore it."""
    call = libc_function("sync_file_range")
    if call is not None:  # its result is ignored: fsync, later, reports every error
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(SYNC_FILE_RANGE_WRITE))


def free_memory() -> int | None:
    """Bytes of RAM that are unused, by cached files too; None where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def drop_page_cache(fd: int, end: int) -> None:
    """Tells the kernel that the bytes before `end` need not stay in memory once they are on disk. It may ignore it."""
    call: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)
    if call is not None:
        with contextlib.suppress(OSError):  # advice; fsync, later, reports every error
            call(fd, 0, end, os.POSIX_FADV_DONTNEED)


def exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Swaps two paths in one step. False where the system cannot."""
    call = libc_function("renameat2")
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT - {errno.EXDEV, errno.EPERM}:
        return False
    raise OSError(code, os.strerror(code), os.fspath(one), None, os.fspath(other))


def libc_function(name: str) -> Any:
    """A function of Linux' C library; None where there is none."""
    return getattr(_libc(), name, None) if sys.platform.startswith("linux") else None


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
