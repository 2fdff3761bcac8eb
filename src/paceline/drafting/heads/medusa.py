"""Medusa heads (2401.10774, section 2.1): one small head for each of the next positions, all over the same state of the target.

The state is the target's last one after the final norm, of the token before the pending one: the target's output matrix chose the
pending token from it, and head i (from 0) tells the token i + 1 behind it. The heads do not see each other's tokens, so a tree's
children at a depth are the same under every parent. Point-mass drafts, never typical acceptance: the text is the target's own.
Costs the heads' output matrices once a round; needs the target's last hidden state.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.choice import TokenChooser
from paceline.drafting.heads.checkpoint import MEDUSA, Checkpoint, Shape, read_head
from paceline.drafting.heads.target import DraftVocabulary, HeadTarget, check_precision
from paceline.drafting.options import whole
from paceline.drafting.temperature import DraftTemperature
from paceline.drafting.templates import LearntTemplate
from paceline.drafting.trees import depths
from paceline.errors import OptionError
from paceline.records import Draft, Outlook, Verdict

_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.weight")
_RANK_GUESS = (0.5, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01)
"""First estimate of the chance that the b-th child is the accepted one; learnt from verdicts afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaOptions:
    """Settings of `medusa:PATH`."""

    precision: str = "auto"
    """Of the heads' matrices; `auto`: the target's own, but at least 8 bits."""
    tree_width: int = 8
    """Tree form: most children of a node (2 to 8)."""

    def __post_init__(self) -> None:
        check_precision(self.precision)
        whole("tree_width", self.tree_width, 2, len(_RANK_GUESS))


class MedusaHeads:
    """K heads: residual blocks x + silu(linear(x)), then an output matrix of the head's own or, where files leave it out, the
    target's."""

    def __init__(self, checkpoint: Checkpoint, target: HeadTarget) -> None:
        """Raises ModelError when the files do not make up the heads, or were made for another target."""
        tensors = checkpoint.tensors
        blocks = [found for found in map(_BLOCK.fullmatch, tensors) if found is not None]
        if not blocks:
            raise checkpoint.refuse("no residual blocks among the tensors; fetch the whole head")
        target.check_hidden(checkpoint, tensors[blocks[0].string].shape[-1])
        self.count = 1 + max(int(block[1]) for block in blocks)
        self.depth = 1 + max(int(block[2]) for block in blocks)
        drafted = len(tensors.get("heads.0.weight", range(target.vocab)))
        checkpoint.check(*self._shapes(checkpoint, target, drafted))
        self._blocks = [
            [
                target.linear(tensors[f"blocks.{head}.{place}.weight"], tensors.get(f"blocks.{head}.{place}.bias"))
                for place in range(self.depth)
            ]
            for head in range(self.count)
        ]
        own = "heads.0.weight" in tensors
        matrices = [tensors[f"heads.{head}.weight"] for head in range(self.count)] if own else [None]
        self._outputs = [target.output(matrix) for matrix in matrices]
        self.vocabulary = DraftVocabulary(checkpoint, target, drafted)
        self.weight_bytes = sum(linear.weight_bytes for linears in (*self._blocks, self._outputs) for linear in linears)

    def _shapes(self, checkpoint: Checkpoint, target: HeadTarget, drafted: int) -> tuple[dict[str, Shape], dict[str, Shape]]:
        hidden = target.hidden
        places = [f"{head}.{place}" for head in range(self.count) for place in range(self.depth)]
        required: dict[str, Shape] = {f"blocks.{place}.weight": (hidden, hidden) for place in places}
        if "blocks.0.0.bias" in checkpoint.tensors:
            required |= {f"blocks.{place}.bias": (hidden,) for place in places}
        if "heads.0.weight" in checkpoint.tensors:
            required |= {f"heads.{head}.weight": (drafted, hidden) for head in range(self.count)}
        return required, {"d2t": (drafted,), "t2d": (target.vocab,)}

    @torch.inference_mode()
    def logits(self, state: torch.Tensor, count: int) -> torch.Tensor:
        """[count, V] float32 of the first `count` heads. state: [H] float32."""
        outputs = []
        for blocks in self._blocks[:count]:
            x = state[None]
            for linear in blocks:
                x = x + F.silu(linear(x).float())
            outputs.append(x)
        if len(self._outputs) == 1:  # shared: one pass over the matrix
            rows = self._outputs[0](torch.cat(outputs))
        else:
            rows = torch.cat([output(x) for output, x in zip(self._outputs, outputs, strict=False)])
        return self.vocabulary.widen(rows.float())


class MedusaDrafter(Drafter):
    """`medusa:PATH`: a chain of each head's best token, or a tree of their best ones, in the shape that was accepted most."""

    options_type = MedusaOptions

    def __init__(self, heads: MedusaHeads, target: HeadTarget, name: str, options: MedusaOptions, *, tree: bool = False) -> None:
        self.heads = heads
        self.wants_hidden = (target.layers,)
        self.name = name
        self.tree = tree
        self.vocab_size = target.draft_vocab
        self.width = options.tree_width
        self.template = LearntTemplate(_RANK_GUESS[: options.tree_width], max_depth=heads.count)
        self.temperature = DraftTemperature(0.0)

    @classmethod
    def build(cls, spec: DrafterSpec, options: MedusaOptions, context: DrafterContext) -> MedusaDrafter:
        target = HeadTarget.of(spec, context, options.precision)
        checkpoint = read_head(spec.argument)
        if checkpoint.method != MEDUSA:
            raise OptionError(
                f"draft = '{spec}': the files hold an {checkpoint.method} head; write {checkpoint.method}:{spec.argument}"
            )
        return cls(MedusaHeads(checkpoint, target), target, str(spec), options, tree=spec.tree)

    def open(self, view: SequenceView) -> MedusaSession:
        return MedusaTreeSession(self, view) if self.tree else MedusaSession(self, view)

    def memory_bytes(self) -> int:
        return self.heads.weight_bytes


class MedusaSession(DraftSession):
    """Keeps the one state that the heads read."""

    def __init__(self, drafter: MedusaDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._view = view
        self._seen = 0
        """Tokens whose states came by; all but the pending one when none was missed."""
        self._state: torch.Tensor | None = None
        self._chooser = TokenChooser(view, drafter.temperature.sampling_of(view.sampling), drafter.vocab_size)

    def follow(self, hidden: torch.Tensor) -> None:
        self._seen += len(hidden)
        self._state = hidden[-1, 0]

    def outlook(self, max_tokens: int) -> Outlook:
        complete = self._state is not None and self._seen == len(self._view.tokens) - 1
        return Outlook(self._drafter.name, max(0, self._most(max_tokens)) if complete else 0)

    def _most(self, max_tokens: int) -> int:
        return min(max_tokens, self._drafter.heads.count)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        num_tokens = self.outlook(num_tokens).available
        if num_tokens < 1 or self._state is None:
            return Draft((), drafter=self._drafter.name)
        chosen = self._chooser.begin()
        for row in self._drafter.heads.logits(self._state, num_tokens):
            features = chosen.add(row)
            if chosen.tokens[-1] in self._view.end_ids or not keep_drafting(features):
                break
        return chosen.draft(self._drafter.name)


class MedusaTreeSession(MedusaSession):
    """The learnt template (2401.10774, section 2.3.3, with figures learnt on-line), filled with each head's best tokens."""

    def __init__(self, drafter: MedusaDrafter, view: SequenceView) -> None:
        super().__init__(drafter, view)
        self._drafted: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        """Parents and ranks of the last draft's nodes."""

    def _most(self, max_tokens: int) -> int:
        return len(self._drafter.template.shape(max(0, max_tokens)))

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        num_tokens = self.outlook(num_tokens).available
        if num_tokens < 1 or self._state is None:
            return Draft((), drafter=self._drafter.name)
        shape = self._drafter.template.shape(num_tokens)
        levels = depths(shape.parents)
        rows = self._drafter.heads.logits(self._state, max(levels))
        best = [self._chooser.children(row, [], self._drafter.width) for row in rows]
        place = {-1: -1}
        nodes: list[tuple[int, int, int, float]] = []
        for node, (above, rank, level) in enumerate(zip(shape.parents, shape.ranks, levels, strict=True)):
            ended = above in place and above >= 0 and nodes[place[above]][0] in self._view.end_ids
            if above in place and not ended and rank < len(best[level - 1]):
                place[node] = len(nodes)
                token, prob = best[level - 1][rank]
                nodes.append((token, place[above], rank, prob))
        tokens, parents, ranks, confidences = zip(*nodes, strict=True)
        self._drafted = parents, ranks
        return Draft(tokens, parents, confidences=confidences, drafter=self._drafter.name)

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        if verdict is not None:
            self._drafter.template.learn(*self._drafted, verdict)
