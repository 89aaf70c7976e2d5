"""System calls that not every system has: Linux, macOS and Windows differ here and nowhere else in this folder.

Each has a plain way for systems without it, or reports in its result that there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
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


_seeking = threading.Lock()  # where a read or a write at an offset takes two calls


def open_flags(*names: str) -> int:
    """The flags of `os.open` by name, without those that this system lacks; binary where that is not the only mode."""
    out = int(getattr(os, "O_BINARY", 0))
    for name in names:
        out |= int(getattr(os, f"O_{name}", 0))
    return out


def read_at(fd: int, length: int, offset: int) -> bytes:
    """At most `length` bytes at an offset."""
    call: Callable[[int, int, int], bytes] | None = getattr(os, "pread", None)
    if call is not None:
        return call(fd, length, offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, length)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Reads at an offset into a buffer; how many bytes."""
    call: Callable[[int, list[memoryview], int], int] | None = getattr(os, "preadv", None)
    if call is not None:
        return call(fd, [buffer], offset)
    data = read_at(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def _write_at(fd: int, data: memoryview, offset: int) -> int:
    call: Callable[[int, memoryview, int], int] | None = getattr(os, "pwrite", None)
    if call is not None:
        return call(fd, data, offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def open_folder(path: str | os.PathLike[str], *, follow: bool = True) -> int | None:
    """A descriptor of a folder; None where folders cannot be opened (Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return None
    return os.open(path, open_flags("RDONLY", "DIRECTORY", "CLOEXEC", *(() if follow else ("NOFOLLOW",))))


def lock(fd: int) -> bool:
    """Locks an open file or folder for this descriptor. False where another process holds the lock.

    Where there are no locks, in this system or in this file system, that is never noticed.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Flushes the entries of a folder, where the system can."""
    fd = open_folder(path)
    if fd is None:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename_folder(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Renames a folder; an empty one may be there, as in POSIX."""
    try:
        os.rename(old, new)
    except FileExistsError:
        os.rmdir(new)
        os.rename(old, new)


def clone(source: int, target: int) -> bool:
    """Makes `target` share the bytes of `source` (file descriptors) on disk. False where the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        import fcntl
    except ImportError:
        return False
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
                data = read_at(source, min(length, READ_BYTES), offset)
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
        done = _write_at(fd, view[:WRITE_BYTES], at)
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
