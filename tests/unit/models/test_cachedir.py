"""The cache folder: whole files or none, one builder at a time, errors that say what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from paceline.errors import CacheError
from paceline.models import cachedir


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "mine"))
    assert cachedir.cache_root() == tmp_path / "mine"
    monkeypatch.delenv("PACELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cachedir.cache_root() == tmp_path / "paceline"


def test_json_comes_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "costs.json"
    cachedir.write_json_atomic(path, {"t": [1, 2.5], "name": "é"})
    assert cachedir.read_json(path) == {"t": [1, 2.5], "name": "é"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_a_missing_or_damaged_document_reads_as_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "costs.json"
    if content is not None:
        path.write_bytes(content)
    assert cachedir.read_json(path) is None


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.json"
    cachedir.write_json_atomic(path, 1)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CacheError, match=r"cannot write .*costs\.json: No space left.*set PACELINE_CACHE"):
        cachedir.write_json_atomic(path, 2)
    assert cachedir.read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_filled_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "part").write_text("half")
        full_disk()

    with pytest.raises(CacheError, match="No space left"):
        cachedir.build_folder(tmp_path / "built", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_rebuilt_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    cachedir.build_folder(tmp_path / "built", lambda folder: (folder / "old").touch())
    cachedir.build_folder(tmp_path / "built", lambda folder: (folder / "new").touch())
    assert [path.name for path in (tmp_path / "built").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["built"]


def test_a_cache_path_that_is_a_file_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="PACELINE_CACHE"), cachedir.locked(tmp_path / "file" / "model"):
        pass
    with pytest.raises(CacheError, match="PACELINE_CACHE"):
        cachedir.write_json_atomic(tmp_path / "file" / "costs.json", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write into read-only folders")
def test_a_read_only_cache_is_a_cache_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CacheError, match=r"Permission denied.*PACELINE_CACHE"):
        cachedir.write_json_atomic(tmp_path / "costs.json", 1)


@pytest.mark.parametrize("flock", [True, False])
def test_a_second_holder_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool) -> None:
    if not flock:
        monkeypatch.setattr(cachedir, "fcntl", None)
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with cachedir.locked(tmp_path / "model"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with cachedir.locked(tmp_path / "model"):
        inside.set()
        thread.join(timeout=0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("flock", [True, False])
def test_a_lock_that_is_never_given_back_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool) -> None:
    if not flock:
        monkeypatch.setattr(cachedir, "fcntl", None)
    with (
        cachedir.locked(tmp_path / "model"),
        pytest.raises(CacheError, match=r"model\.lock was held"),
        cachedir.locked(tmp_path / "model", wait_seconds=0.1),
    ):
        pass


def test_a_lock_file_left_by_a_crash_is_taken_over_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cachedir, "fcntl", None)
    left = tmp_path / "model.lock"
    left.touch()
    os.utime(left, (0, 0))
    with cachedir.locked(tmp_path / "model", wait_seconds=0.1):
        assert left.exists()
    assert not left.exists()


def test_a_killed_holder_gives_the_lock_back(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from paceline.models.cachedir import locked\n"
        "with locked(Path(sys.argv[1])): os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False).returncode == 1
    with cachedir.locked(tmp_path / "model", wait_seconds=0.1):
        pass


def test_an_error_inside_the_lock_is_not_taken_for_one_of_the_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), cachedir.locked(tmp_path / "model"):
        (tmp_path / "missing").read_text()
