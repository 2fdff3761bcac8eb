"""A toy that decodes ahead and draws, shared by the tests of what an engine makes of that."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.execution.base import Decoded, Decoding, ForwardOutput, Segment, known
from paceline.execution.cuda.stepping import Stepping, decode, prepared, reference_steps
from paceline.execution.draws import draw_rows
from toys import Language, ToyRunner

VOCAB = 40


class AheadToy(ToyRunner):
    """As the GPU's runner, by the readable forms."""

    decodes_ahead = draws_rows = logits_are_far = takes_late = True

    def __init__(self, language: Language) -> None:
        super().__init__(language, VOCAB)
        self.joined: list[int] = []
        self.draws = 0

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        segments = [known(segment) for segment in segments]
        output = super().forward(segments, want_hidden=want_hidden)
        drawn, first = list[int](), 0
        for segment in segments:
            count = len(segment.tokens) if segment.num_logits is None else segment.num_logits
            if segment.draws is not None:
                drawn += draw_rows(output.logits[first : first + count], segment.draws, count)
                self.draws += count
            first += count
        return ForwardOutput(output.logits, output.hidden, drawn=drawn if len(drawn) == first and drawn else None)

    def stepping(self, jobs: Sequence[Decoding], feeds: Sequence[Sequence[int]]) -> Stepping:
        return reference_steps(self, jobs, feeds)

    def decode_ahead(self, jobs: Sequence[Decoding]) -> list[Decoded]:
        self.joined.append(len(jobs))
        feeds, most = prepared(self, jobs, self.info.max_context)
        ends = [job.sequence.length + len(feed) for job, feed in zip(jobs, feeds, strict=True)]
        decoded = decode(jobs, most, self.stepping(jobs, feeds))
        for job, end, found in zip(jobs, ends, decoded, strict=True):
            self.truncate(job.sequence, end + max(0, len(found.tokens) - (found.late is None)))
        return decoded
