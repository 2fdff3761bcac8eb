"""`paceline`: the commands, and the one place where errors become one line and an exit code.

Exit codes: 0 done; 1 it failed; 2 the input is wrong; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from paceline._version import __version__
from paceline.cli.bench import bench
from paceline.cli.chat import chat
from paceline.cli.compare import compare
from paceline.cli.corpus import corpus
from paceline.cli.explain import explain
from paceline.cli.generate import generate
from paceline.cli.info import info
from paceline.cli.lists import controllers, drafters
from paceline.cli.replay import replay
from paceline.cli.stack import stack
from paceline.cli.trace import trace
from paceline.cli.train import train
from paceline.errors import PacelineError

_UsageError: Any = typer.BadParameter.__mro__[1]
"""What the parser raises for unknown options and values of the wrong kind; typer has no public name for it."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Adaptive speculative decoding: the same text, sooner, and never slower than plain decoding."""


for command in (generate, chat, info, explain, bench, compare, controllers, drafters, trace, replay, stack):
    app.command()(command)
app.add_typer(corpus, name="corpus")
app.add_typer(train, name="train")


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    """What is wrong with the arguments, and where the right ones are listed."""
    command = error.ctx.command_path if error.ctx is not None else "paceline"
    return f"{error.format_message().rstrip('.')}; `{command} --help` lists commands and options"


def run() -> None:
    """Entry point of the `paceline` command."""
    sys.exit(run_guarded())


def run_guarded() -> int:
    """Run the command line of `sys.argv`; errors become one line on stderr. Returns the exit code."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="paceline", standalone_mode=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, _UsageError):
            return _fail(_usage(error), 2) if error.format_message() else 2  # empty: a group without a command showed its help
        if "--debug" in sys.argv[1:]:
            raise
        if isinstance(error, PacelineError):
            return _fail(str(error), 2 if isinstance(error, ValueError) else 1)
        if isinstance(error, (OSError, MemoryError)):
            return _fail(str(error) or "out of memory", 1)
        return _fail(f"{type(error).__name__}: {error} (a fault of paceline; `paceline --debug ...` shows where)", 1)
    return code if isinstance(code, int) else 0
