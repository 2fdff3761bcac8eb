"""Libraries that are compiled at first use."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from paceline import compiled

pytestmark = pytest.mark.skipif(compiled.find_compiler() is None, reason="no C compiler")


def sources(folder: Path, text: str, version: int = 7) -> compiled.Sources:
    (folder / "small.c").write_text(text)
    return compiled.Sources(name="small", folder=folder, files=("small.c",), flags=("-O1",), abi=("small_version", version))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PACELINE_NATIVE", raising=False)
    return tmp_path / "cache" / "native"


def test_a_changed_source_is_compiled_anew_and_an_unchanged_one_is_not(tmp_path: Path, cache: Path) -> None:
    text = "int small_version(void) { return 7; } int small_answer(void) { return %d; }"
    for answer in (1, 2, 2):
        library = compiled.load(sources(tmp_path, text % answer))
        assert isinstance(library, ctypes.CDLL)
        assert library.small_answer() == answer
    assert len(list(cache.glob("small-*.so"))) == 2


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "refused the small" in str(compiled.load(sources(tmp_path, "this is not C")))
    assert "another interface version" in str(compiled.load(sources(tmp_path, "int small_version(void) { return 6; }")))
    monkeypatch.setenv("PACELINE_NATIVE", "0")
    assert "PACELINE_NATIVE=0" in str(compiled.load(sources(tmp_path, "int small_version(void) { return 7; }")))


def test_a_cache_that_cannot_be_written_costs_the_compilation_only(tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    library = compiled.load(sources(tmp_path, "int small_version(void) { return 7; }"))
    assert isinstance(library, ctypes.CDLL)
