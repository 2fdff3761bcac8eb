"""What a user imports: small, sorted, typed, cheap to import, and of one version."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import paceline

ROOT = Path(paceline.__file__).parents[2]


def test_all_is_sorted_and_every_name_exists() -> None:
    assert list(paceline.__all__) == sorted(paceline.__all__)
    missing = [name for name in paceline.__all__ if not hasattr(paceline, name)]
    assert not missing


def test_package_is_marked_as_typed() -> None:
    assert (Path(paceline.__file__).parent / "py.typed").is_file()


def test_changelog_begins_with_the_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == paceline.__version__


def test_settings_and_command_line_load_without_torch() -> None:
    code = "import sys, paceline.config, paceline.cli.main; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
