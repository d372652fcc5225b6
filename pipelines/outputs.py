"""Output folders that are whole or not there: written beside their place, then swapped in."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.processes import runs


class OutputError(RuntimeError):
    """An output folder that cannot be written; what stood there before is untouched."""


_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space (`dvc gc -w` removes unused results)",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "the file size limit is reached (`ulimit -f`)",
    errno.EROFS: "the file system is read-only: choose a writable folder",
    errno.EACCES: "this user may not write there: check the folder's owner and rights",
    errno.EPERM: "this user may not write there: check the folder's owner and rights",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away",
    errno.EEXIST: "a file stands where a folder is needed: move it away",
}


def explain_os_error(error: OSError, target: Path) -> OutputError | None:
    """A clear error for what goes wrong when writing to `target`; None for any other OSError."""
    advice = _ADVICE.get(error.errno or 0)
    if advice is None:
        return None
    return OutputError(f"{target}: cannot be written, {advice}. Earlier results there are unchanged. ({error})")


def _ours(error: OSError, target: Path) -> bool:
    """Whether the error is about the output's place, and not, say, an unreadable input."""
    if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    place, about = target.parent.absolute(), Path(os.fsdecode(error.filename)).absolute()
    return about.is_relative_to(place) or place.is_relative_to(about)


def _full_disk(error: Exception, folder: Path) -> bool:
    if "No space left on device" in str(error) or "os error 28" in str(error):
        return True
    return folder.is_dir() and shutil.disk_usage(folder).free < 4096


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends well.

    On an exception, or a kill, `target` keeps its earlier content.

    Raises:
        OutputError: the place cannot be written (disk full, read-only, …).
    """
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for stale in target.parent.glob(f"{target.name}.*.partial"):
                if not _alive(stale):
                    _remove(stale)
            partial.mkdir()
            yield partial
            _swap(partial, target)
        except OSError as error:
            clear = explain_os_error(error, target) if _ours(error, target) else None
            if clear is None:
                raise
            raise clear from error
        except Exception as error:
            # safetensors, torch and llama.cpp report a full disk in words and types of their own
            if not _full_disk(error, target.parent):
                raise
            cause = OSError(errno.ENOSPC, str(error))
            raise explain_os_error(cause, target) or error from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def _alive(partial: Path) -> bool:
    """Whether the process that writes `partial` still runs."""
    pid = partial.name.removesuffix(".old.partial").removesuffix(".partial").rsplit(".", 1)[-1]
    try:
        return runs(int(pid), partial.lstat().st_mtime)
    except (ValueError, FileNotFoundError):
        return False


def _swap(partial: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.{os.getpid()}.old.partial")
    if target.exists() or target.is_symlink():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _remove(old)


@contextmanager
def exclusive(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file while the block runs, so that the same work is not done twice at once.

    Raises:
        OutputError: another process holds it.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        clear = explain_os_error(error, lock)
        if clear is None:
            raise
        raise clear from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{what} is already running in another process; wait for it or stop it") from None
        yield
