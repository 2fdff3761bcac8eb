"""`paceline chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import typer

from paceline.cli import loading
from paceline.cli.generate import System, print_summary
from paceline.cli.options import Settings, takes_settings
from paceline.cli.output import StreamFold, echo_event
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.errors import OptionError, PromptError

if TYPE_CHECKING:
    from paceline.engine import Engine
    from paceline.records import GenerationResult

HELP = "/quit ends, /reset forgets the conversation, /stats sums up; Ctrl-C stops an answer"


@takes_settings(SpeculationConfig, SamplingParams, RunnerConfig)
def chat(system: System = "", *, settings: Settings) -> None:
    """Talk with the model. /quit ends, /reset forgets the conversation, /stats sums up."""
    if settings.sampling.n > 1:
        raise OptionError(f"-n = {settings.sampling.n}: a chat has one answer; leave it out")
    with loading.open_engine(settings) as engine:
        typer.echo(typer.style(HELP, dim=True), err=True)
        Conversation(engine, settings.sampling, system).run()


class Conversation:
    """Turns so far, and what they cost."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str) -> None:
        self.engine = engine
        self.params = params
        self.system = system
        self.results: list[GenerationResult] = []
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget the turns, keep the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def run(self) -> None:
        """Read lines until /quit or the end of the input."""
        while (line := _read_line()) is not None:
            words = line.strip()
            if words == "/quit":
                return
            if words == "/reset":
                self.reset()
            elif words == "/stats":
                self.print_statistics()
            elif words.startswith("/"):
                typer.echo(f"unknown command {words}: {HELP}", err=True)
            elif words:
                self.answer(line)

    def answer(self, text: str) -> None:
        """One turn. Ctrl-C ends the answer, not the conversation; a turn that is refused is not kept."""
        self.messages.append({"role": "user", "content": text})
        fold = StreamFold()
        try:
            fold.follow(self.engine.chat_stream(self.messages, self.params), partial(echo_event, self.engine))
        except PromptError as error:
            self.messages.pop()
            typer.echo(f"error: {error}; /reset starts afresh", err=True)
            return
        result = fold.finish(self.engine)
        typer.echo()
        print_summary(self.engine, result)
        self.results.append(result)
        self.messages.append({"role": "assistant", "content": result.text})

    def print_statistics(self) -> None:
        """Tokens, speed and acceptance over all answers."""
        tokens = sum(result.num_tokens for result in self.results)
        seconds = sum(result.decode_seconds for result in self.results)
        drafted = sum(result.num_drafted for result in self.results)
        accepted = sum(result.num_accepted for result in self.results)
        speed = f"{tokens / seconds:.1f} tok/s" if seconds else "no speed yet"
        rate = f"{accepted} of {drafted} drafted tokens accepted" if drafted else "nothing drafted"
        typer.echo(f"{len(self.results)} answers, {tokens} tokens, {speed}, {rate}", err=True)


def _read_line() -> str | None:
    """The next line, None at the end. Raises PromptError when it is not UTF-8."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    data = sys.stdin.buffer.readline()
    return loading.decode_utf8(data).rstrip("\n") if data else None
