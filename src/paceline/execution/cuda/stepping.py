"""Decoding whose tokens stay on the device from one step to the next, while the host reads along (ours).

A captured step ends with a token of each sequence as the input of the next one, and with a line of tokens and evidence in memory of
the host that the device writes to. The host waits for a line, not for the device: the next step runs on meanwhile. Random numbers
are functions of seed and position, so those of all steps are sent ahead. Nor does the host wait for the last line, about which
nobody is asked: its tokens are late, and a forward on the same device takes them from where the next step would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from paceline.errors import OptionError
from paceline.execution.base import Decoded, Decoding, Runner, Segment, SequenceHandle, known, prefill, with_last
from paceline.execution.cuda.capture import Layout, check
from paceline.execution.cuda.linears import MAX_ROWS
from paceline.execution.draws import DrawLaw, draw_from, row_weights
from paceline.records import DecodedToken, LateToken

if TYPE_CHECKING:
    from paceline.execution.cuda.drawing import Drawer
    from paceline.execution.cuda.following import Verification

RING = 256
"""Lines that the device writes round and round; far more than steps under way."""


class Stepping(NamedTuple):
    """A decoding loop's steps, of which the first ones were issued."""

    issue: Callable[[], None]
    """Begins another one."""
    read: Callable[[], list[DecodedToken]]
    """Waits for the tokens of the next one in turn."""
    leave: Callable[[], Sequence[LateToken]]
    """The tokens of the next one in turn, about which nobody is asked, without waiting."""
    issued: int = 1


class Line:
    """What one step decodes for each sequence."""

    def __init__(self, read: Callable[[], list[DecodedToken]], inputs: torch.Tensor) -> None:
        """inputs: [64] int32, the tokens on their device, until its runner begins to decode again; 0 for those that came to
        nothing."""
        self._read, self.inputs = read, inputs
        self.is_last = True
        """Whether the inputs are still those that this step left."""
        self._tokens: list[DecodedToken] | None = None
        self.waited = 0.0
        self.follow: Callable[[Verification], None] | None = None
        """Begins the next draft's first steps behind a verification of this one."""

    @property
    def is_known(self) -> bool:
        """Whether the host has read it."""
        return self._tokens is not None

    def tokens(self) -> list[DecodedToken]:
        """Waits for the step."""
        if self._tokens is None:
            started = perf_counter()
            self._tokens = self._read()
            self.waited = perf_counter() - started
        return self._tokens


class InLine(LateToken):
    """A late token as its place in a line."""

    def __init__(self, line: Line, place: int) -> None:
        self.line, self.place = line, place

    def is_on(self, device: torch.device) -> bool:
        """Whether it is to be fetched there rather than read."""
        return self.line.is_last and not self.line.is_known and self.line.inputs.device == device

    def wait(self) -> DecodedToken:
        tokens = self.line.tokens()
        self.waited = self.line.waited
        return tokens[self.place]


class Steps:
    """Inputs of captured steps of up to 64 sequences, and what they decoded."""

    def __init__(self, layout: Layout, vocab: int) -> None:
        """layout: of ordinary forwards, which shares its scratch memory with the steps."""
        device = layout.tables.device
        self.layout = layout.twin()
        self._line = torch.zeros(1, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(RING, MAX_ROWS, dtype=torch.int32, pin_memory=True)
        self._evidence = torch.zeros(RING, MAX_ROWS, 4, pin_memory=True)
        self._written: list[Any] = [torch.cuda.Event() for _ in range(RING)]  # type: ignore[no-untyped-call]
        self._issued = 0
        self._vocab = vocab
        self._drawer: Drawer | None = None
        self._laws: list[DrawLaw | None] = []
        """Those that were sent last."""
        self._lines: deque[Line] = deque()
        self._left: Line | None = None

    def begin(self) -> None:
        """Call before the inputs are filled anew: a line that was left is read while it is there."""
        if self._left is not None:
            self._left.tokens()
        self._left = None
        self._lines.clear()

    def begin_behind(self) -> None:
        """As `begin`, without waiting: whoever takes the line that was left has sent for it, or reads it soon."""
        if self._left is not None:
            self._left.is_last = False
        self._left = None
        self._lines.clear()

    def leave(self) -> Line:
        """The oldest line that was not read, without waiting for it."""
        self._left = self._lines.popleft()
        return self._left

    def describe(self, jobs: Sequence[Decoding]) -> None:
        """Send laws and random numbers of the coming steps."""
        if any(job.law is not None for job in jobs):
            self.describe_laws([job.law for job in jobs])
            self.send([job.numbers if job.law is not None else () for job in jobs])

    def describe_laws(self, laws: Sequence[DrawLaw | None]) -> None:
        """Send the law of each row, unless it is there."""
        if self._laws[: len(laws)] != list(laws):
            self._laws = list(laws)
            self.make_drawer().describe(laws)

    def send(self, numbers: Sequence[Sequence[int]]) -> None:
        """Send the random numbers of each row for the coming steps."""
        if any(numbers):
            self.make_drawer().send(numbers, self._issued % RING)

    def accept(
        self, target: Verification, layout: Layout, told: torch.Tensor, numbers: Sequence[Sequence[int]], steps: int
    ) -> None:
        """Let the device accept what `target` verifies, and put what is fed next into `layout`, and what follows it here.

        numbers: as `following.numbers_ahead`.
        """
        from paceline.execution.cuda.fused import accept

        drawn: dict[str, Any] = {}
        if any(numbers):
            drawer = self.make_drawer()
            drawn = {"ahead": drawer.beside(numbers), "line": self._line, "numbers": drawer.numbers, "steps": steps}
        accept(target, layout, self.layout.lengths, told, len(numbers), self._vocab, **drawn)

    def silence(self, slots: Sequence[int]) -> None:
        """Let rows whose slot is -1 write where nobody reads. slots: of each row."""
        sent = torch.tensor(slots, dtype=torch.int32, pin_memory=self.layout.sequences.is_cuda)
        self.layout.sequences[: len(slots)].copy_(sent, non_blocking=True)

    def make_drawer(self) -> Drawer:
        """What draws at the end of steps; made when it is first needed."""
        if self._drawer is None:
            from paceline.execution.cuda.drawing import Drawer

            device = self.layout.tables.device
            tokens = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
            self._drawer = Drawer(MAX_ROWS, self._vocab, device, tokens, RING)
        return self._drawer

    def advance(self, logits: torch.Tensor, best: Any, rows: int, *, drawn: bool, first: bool = False) -> None:
        """Launch what ends a step: tokens of its rows become the next inputs, and a line is written.

        first: the forward was one over what is fed, and the rows of interest are `layout.sources`.
        """
        from paceline.execution.cuda.fused import advance

        drawer = self.make_drawer() if drawn else None
        if drawer is not None:
            drawer.launch(logits, best.tokens, rows, self._line, self.layout.sources if first else None)
        advance(best, self.layout, self._line, self._tokens, self._evidence, rows, drawer=drawer, gather=first, grow=not first)

    def issued(self, count: int) -> None:
        """Call behind each step on the stream. count: sequences."""
        line = self._issued % RING
        self._written[line].record()
        self._issued += 1
        for before in self._lines:
            before.is_last = False
        self._lines.append(Line(partial(self._read, line, count), self.layout.tokens))

    def restart(self) -> None:
        """Forget steps that ran for nothing but a capture: the device counts lines, too."""
        self._line.fill_(self._issued % RING)

    def read(self) -> list[DecodedToken]:
        """What the oldest step that was not read decoded for each sequence; waits for it."""
        return self._lines.popleft().tokens()

    def _read(self, line: int, count: int) -> list[DecodedToken]:
        self._written[line].synchronize()
        rows = zip(self._tokens[line, :count].tolist(), self._evidence[line, :count].tolist(), strict=True)
        return [DecodedToken(token, *evidence) for token, evidence in rows]


def prepared(runner: Runner, jobs: Sequence[Decoding], max_context: int, *, packed: bool = False) -> tuple[list[list[int]], int]:
    """Checks jobs and feeds what is too long for one forward; returns what is left to feed to each, and the number of steps.

    packed: sequences share the forwards that read for them, each of 64 rows.

    A sequence that ends early runs along with the others, so all have room for every step. Raises OptionError, ResourceError.
    """
    for job in jobs:
        if job.most < 1 or (job.law is not None and len(job.numbers) < job.most):
            raise OptionError(f"most = {job.most}: must be at least 1, with a random number for each token that is drawn")
    check([Segment(job.sequence, job.feed) for job in jobs], runner.info.vocab_size)
    feeds, ahead = [list(job.feed) for job in jobs], list[tuple[SequenceHandle, list[int]]]()
    while sum(map(len, feeds)) > MAX_ROWS:
        longest = max(range(len(feeds)), key=lambda i: len(feeds[i]))
        ahead.append((jobs[longest].sequence, feeds[longest][:-1]))
        feeds[longest] = feeds[longest][-1:]
    if packed:
        _read_packed(runner, ahead)
    else:
        for sequence, tokens in ahead:
            prefill(runner, sequence, tokens)
    room = min(max_context - job.sequence.length - len(feed) + 1 for job, feed in zip(jobs, feeds, strict=True))
    return feeds, max(1, min(max(job.most for job in jobs), room))


def _read_packed(runner: Runner, texts: Sequence[tuple[SequenceHandle, Sequence[int]]]) -> None:
    """Feed and commit tokens of several sequences, 64 in a forward, whosesoever they are."""
    pending, room = list[Segment](), MAX_ROWS

    def read() -> None:
        runner.forward(pending)
        for segment in pending:
            runner.accept(segment.sequence, range(len(segment.tokens)))
        pending.clear()

    for sequence, tokens in texts:
        start = 0
        while start < len(tokens):
            part = tokens[start : start + room]
            pending.append(Segment(sequence, part, num_logits=0))
            start, room = start + len(part), room - len(part)
            if room == 0:
                read()
                room = MAX_ROWS
    if pending:
        read()


def decode(jobs: Sequence[Decoding], most: int, stepping: Stepping) -> list[Decoded]:
    """Issue steps and read their tokens until nobody need be asked any more; see `Runner.decode_ahead`."""
    limits = [min(job.most, most) for job in jobs]
    going = [limit > 1 for limit in limits]
    decoded: list[list[DecodedToken]] = [[] for _ in jobs]
    issued, seen = stepping.issued, 0
    while any(going):
        if issued < min(most, seen + 2):  # one step runs while the token before is asked about
            stepping.issue()
            issued += 1
        tokens = stepping.read()
        seen += 1
        for i, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
            if len(decoded[i]) >= limits[i]:
                continue
            if token.token < 0:  # logits that are not finite
                limits[i], going[i] = len(decoded[i]), False
                continue
            decoded[i].append(token)
            if going[i] and not job.keep_on(token):
                limits[i] = min(limits[i], seen + 1)
            going[i] = going[i] and len(decoded[i]) + 1 < limits[i]
    late = stepping.leave() if seen < issued else ()
    return [Decoded(found, late[i] if len(found) < limits[i] else None) for i, found in enumerate(decoded)]


def placed(segments: Sequence[Segment], device: torch.device) -> tuple[list[Segment], Line | None]:
    """Segments without late tokens, for a forward of the kernels on a device: token -1 - i stands for place i of the line that is
    returned, of which there is one at most. Waits for other late tokens."""
    found: list[Segment] = []
    line: Line | None = None
    for segment in segments:
        late = segment.late
        if isinstance(late, InLine) and late.is_on(device) and line in (None, late.line) and len(segment.tokens) <= MAX_ROWS:
            line = late.line
            found.append(with_last(segment, -1 - late.place))
        else:
            found.append(known(segment))
    return found, line


def reference_steps(runner: Runner, jobs: Sequence[Decoding], feeds: Sequence[Sequence[int]]) -> Stepping:
    """What captured steps must equal: the same through single forwards, each when it is read or left. Commits what it feeds."""
    pending, step = [list(feed) for feed in feeds], 0

    def read() -> list[DecodedToken]:
        nonlocal step
        found = []
        for i, job in enumerate(jobs):
            logits = runner.forward([Segment(job.sequence, pending[i], num_logits=1)]).logits[0]
            runner.accept(job.sequence, range(len(pending[i])))
            probs = torch.softmax(logits, -1)
            largest, second = probs.topk(2).values.tolist()
            token, chance = int(probs.argmax()), largest
            if bool(probs.isnan().any()):
                token = -1
            elif job.law is not None and step < len(job.numbers):
                weights = row_weights(logits, job.law)
                token = draw_from(weights, job.numbers[step])
                chance = float(weights[token] / weights.sum())
            pending[i] = [max(token, 0)]
            found.append(DecodedToken(token, largest, float(torch.special.entr(probs).sum()), largest - second, chance))
        step += 1
        return found

    def leave() -> list[LateToken]:
        tokens = read()  # at once, so that what was fed is in the cache
        line = Line(lambda: tokens, torch.zeros(0))
        return [InLine(line, place) for place in range(len(jobs))]

    return Stepping(lambda: None, read, leave)
