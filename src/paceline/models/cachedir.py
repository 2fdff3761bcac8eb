"""The cache folder: where it is, and how several processes write into it without ever leaving half a file.

Writers fill a temporary neighbour and rename it; readers see the old content or the new. What is shared by processes is
built under `locked`. Every failure to write is a CacheError that names the folder and the remedy.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from paceline.errors import CacheError

try:
    import fcntl
except ImportError:  # Windows: the lock file's existence is the lock
    fcntl = None  # type: ignore[assignment]

LOCK_WAIT_SECONDS = 300.0
ABANDONED_SECONDS = 120.0
"""Age at which a lock file without flock is taken for the rest of a crash: longer than anything that is built under one."""
_POLL_SECONDS = 0.05
_FLOCK_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


def cache_root() -> Path:
    """`PACELINE_CACHE`, or `paceline` under the user's cache folder. Not created here."""
    named = os.environ.get("PACELINE_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"


def cache_error(path: Path, cause: OSError) -> CacheError:
    """The one-line error of a failed write below `path`."""
    reason = cause.strerror or type(cause).__name__
    return CacheError(
        f"cache: cannot write {path}: {reason}; free some space, or set PACELINE_CACHE to a folder that can be written"
    )


def _temporary_beside(path: Path) -> Path:
    # Not tempfile: its files are readable by their owner alone, and a cache may be shared.
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, creating its folder. Raises CacheError."""
    temporary = _temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cache_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, data: Any) -> None:
    """Write a JSON document whole or not at all. Raises CacheError."""
    atomic_write(path, json.dumps(data, ensure_ascii=False, indent=1).encode())


def read_json(path: Path) -> Any | None:
    """The JSON document, or None when the file is missing, unreadable or damaged (a cache is then built anew)."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def build_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Build a folder whole or not at all, replacing an older one: `fill` writes into a temporary neighbour.

    Call it under `locked`. Raises CacheError when `fill` or the rename fails with OSError; other errors pass through. Nothing
    is left behind in either case.
    """
    temporary = _temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        fill(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        raise cache_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path, wait_seconds: float = LOCK_WAIT_SECONDS) -> Iterator[None]:
    """Hold an exclusive lock between processes (and threads) on `path` + `.lock`; a second one waits.

    Raises CacheError when the lock file cannot be made, or after `wait_seconds`.
    """
    lock_path = path.with_name(path.name + ".lock")
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        release = _acquire(lock_path, wait_seconds)
    except OSError as error:
        raise cache_error(lock_path, error) from error
    try:
        yield
    finally:
        release()


def _acquire(lock_path: Path, wait_seconds: float) -> Callable[[], None]:
    """Take the lock and return what gives it back."""
    if fcntl is not None:
        try:
            return _advisory_lock(lock_path, wait_seconds)
        except OSError as error:
            if error.errno not in _FLOCK_UNSUPPORTED:
                raise
    return _exclusive_file(lock_path, wait_seconds)


def _wait(acquire: Callable[[], bool], lock_path: Path, wait_seconds: float) -> None:
    give_up = time.monotonic() + wait_seconds
    while not acquire():
        if time.monotonic() > give_up:
            raise CacheError(f"cache: {lock_path} was held for over {wait_seconds:g} s; end the other process, or delete the file")
        time.sleep(_POLL_SECONDS)


def _advisory_lock(lock_path: Path, wait_seconds: float) -> Callable[[], None]:
    """flock: given back by the system when its holder dies, so the file itself may stay."""
    handle = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o644)

    def acquire() -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        _wait(acquire, lock_path, wait_seconds)
    except BaseException:
        os.close(handle)
        raise
    return lambda: os.close(handle)


def _exclusive_file(lock_path: Path, wait_seconds: float) -> Callable[[], None]:
    """Without flock, who creates the file holds the lock. One left by a crash is taken over in time."""

    def acquire() -> bool:
        with suppress(OSError):
            if time.time() - lock_path.stat().st_mtime > ABANDONED_SECONDS:
                lock_path.unlink()
        try:
            os.close(os.open(lock_path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    _wait(acquire, lock_path, wait_seconds)
    return lambda: lock_path.unlink(missing_ok=True)
