"""The pages keep their promises: links lead somewhere, commands and options exist, tables are those of the recorded results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import paceline
from paceline.cli.main import app

ROOT = Path(paceline.__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def options_of(command: str) -> set[str]:
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    spellings = {spelling for parameter in found.params for spelling in (*parameter.opts, *parameter.secondary_opts)}
    return {spelling for spelling in spellings if spelling.startswith("-")} | {"--help"}


COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for command, rest in re.findall(r"(?:^|[`/])paceline ([a-z]+)([^`\n]*)", text, flags=re.MULTILINE):
        assert command in COMMANDS, f"paceline {command}"
        unknown = set(re.findall(r"(?<!\S)--[a-z-]+", rest)) - options_of(command)
        assert not unknown, f"paceline {command}: {unknown}"


def test_command_page_names_every_command_and_every_shared_option() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if f"`{name}" not in text and f"{name}`" not in text]
    assert not missing
    assert not [name for name in options_of("generate") - {"--help", "--compare", "--json"} if f"`{name}" not in text]


def test_tables_are_those_of_the_recorded_results() -> None:
    script = ROOT / "benchmarks" / "make_tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


def test_no_page_mentions_a_path_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", page.read_text(encoding="utf-8")), page.name
