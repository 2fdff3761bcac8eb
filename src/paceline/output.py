"""The output path: where a text ends, to the token, and which of it may be shown already.

A round emits several tokens at once. They are walked one by one, so that an end inside an accepted block cuts text, ids,
log-probabilities and cache at the same token (`Pushed.accepted` tells the caller where).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from paceline.config import SamplingParams
from paceline.errors import OptionError
from paceline.models.base import Tokenizer
from paceline.models.tokenizer import StreamDecoder


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of the tokens of one push."""

    accepted: int
    """How many of the given tokens belong to the output; those after the end do not."""
    pieces: tuple[str, ...]
    """Text released by each accepted token (often its own, sometimes empty)."""
    finished: str | None = None
    """None while the text goes on, else `stop` or `length`."""
    stop_reason: str | int | None = None
    """The stop text or stop token id that ended it; None for the model's own end token and for `length`."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class StopMatcher:
    """Finds the stop text that is completed first in a text that comes in pieces, and holds back what may become one.

    Of stop texts completed by the same character the longest counts, whatever the order in which they were given.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._prefixes = {stop[:n] for stop in stops for n in range(1, len(stop))}
        self._longest_prefix = max((len(stop) - 1 for stop in stops), default=0)

    def push(self, piece: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that can be shown, and the stop text that ended it, if one did (then nothing is held any more).

        may_stop: False ignores stop texts that are completed inside this piece, for good.
        """
        text = self._held + piece
        if may_stop:
            before = len(self._held) + 1  # a stop text must end in the new piece
            found = [(text.find(stop, max(0, before - len(stop))), stop) for stop in self._stops]
            ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
            if ends:
                _, start, stop = min(ends)
                self._held = ""
                return text[:start], stop
        held = self._length_held(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held

    def _length_held(self, text: str) -> int:
        for length in range(min(self._longest_prefix, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0


class OutputAssembler:
    """Collects the emitted tokens of one request, decides where it ends, and releases its text.

    The model's end token and stop token ids belong to `token_ids` (they were generated and are counted), but not to `text`. A stop
    text is cut from `text` with what follows it; `token_ids` then end with the token that completed it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_len: int,
        max_new: int,
        end_ids: Collection[int] = frozenset(),
    ) -> None:
        """tokenizer: None works on ids alone. max_new: most tokens to emit; the smaller of max_tokens and what the context leaves.

        end_ids: the model's end tokens. Raises OptionError for stop texts without a tokenizer.
        """
        if params.stop and tokenizer is None:
            raise OptionError(f"stop = {params.stop!r}: needs a tokenizer; use stop_token_ids")
        self._params = params
        self._prompt_len = prompt_len
        self._max_new = max_new
        self._end_ids = frozenset() if params.ignore_eos else frozenset(end_ids)
        self._decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self._matcher = StopMatcher(params.stop)
        self._endings = self._end_ids | set(params.stop_token_ids)
        self._pieces: list[str] = []
        self._released = 0
        """Pieces that `release` has handed out."""
        self._waiting: list[int] = []
        """Tokens whose text nobody has asked for."""
        self.token_ids: list[int] = []
        self.finished: str | None = "length" if max_new <= 0 else None
        self.stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """All text released so far."""
        return "".join(self._pieces)

    @property
    def length(self) -> int:
        """Prompt and output in tokens: the length that the sequence has, also where a round was cut."""
        return self._prompt_len + len(self.token_ids)

    def push(self, tokens: Sequence[int]) -> Pushed:
        """`add` and `release`: for a stream of single tokens, and for whoever wants the text at once."""
        accepted = self.add(tokens)
        return Pushed(accepted, tuple(self.release()), self.finished, self.stop_reason)

    def add(self, tokens: Sequence[int]) -> int:
        """Walk the tokens of a round until they are used up or the text ends; returns how many belong to the output.

        Their text waits for `assemble`, unless stop texts are looked for in it.
        """
        before = len(self.token_ids)
        for token in tokens:
            if self.finished is not None:
                break
            if self._params.stop:
                self._pieces.append(self._push_one(token))
            else:
                self._waiting.append(token)
                if not self._ends_with(token) and len(self.token_ids) >= self._max_new:
                    self.finished = "length"
        return len(self.token_ids) - before

    def release(self) -> list[str]:
        """Text of each token that was added since the last call."""
        self.assemble()
        new = self._pieces[self._released :]
        self._released = len(self._pieces)
        return new

    def assemble(self) -> None:
        """Make the text that waits, whether or not somebody asks for it yet."""
        waiting, self._waiting = self._waiting, []
        for i, token in enumerate(waiting, 1):
            is_last = i == len(waiting) and self.finished is not None
            piece = self._decoder.push(token) if self._decoder is not None and not (is_last and self.finished == "stop") else ""
            self._pieces.append(piece + self._release_rest() if is_last else piece)

    def flush(self) -> str:
        """Release what was held back, for a text that is broken off; a finished one has nothing left to show."""
        self.assemble()
        if self.finished is not None:
            return ""
        piece = self._release_rest()
        self._pieces.append(piece)
        return piece

    def _ends_with(self, token: int) -> bool:
        """Count a token in; whether it is one that ends the text here."""
        may_end = len(self.token_ids) >= self._params.min_tokens
        self.token_ids.append(token)
        if not may_end or token not in self._endings:
            return False
        self.finished, self.stop_reason = "stop", token if token in self._params.stop_token_ids else None
        return True

    def _push_one(self, token: int) -> str:
        if self._ends_with(token):
            return self._release_rest()
        piece = self._match(self._decoder.push(token)) if self._decoder is not None else ""
        if self.finished is None and len(self.token_ids) >= self._max_new:
            self.finished = "length"
            piece += self._release_rest()
        return piece

    def _match(self, text: str) -> str:
        """Pass new text through the stop texts; finishes the output when one is complete."""
        piece, stop = self._matcher.push(text, may_stop=len(self.token_ids) >= self._params.min_tokens)
        if stop is not None:
            self.finished, self.stop_reason = "stop", stop
        return piece

    def _release_rest(self) -> str:
        """The decoder's last characters may complete a stop text, too."""
        if self._decoder is None:
            return ""
        piece = self._match(self._decoder.flush())
        return piece + self._matcher.flush()
