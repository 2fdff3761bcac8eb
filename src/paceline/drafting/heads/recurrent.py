"""Drafting with heads that feed on themselves (EAGLE 1 to 3): features of the target in, features and a distribution out.

A head reads pairs: the target's feature of position i and the token at i + 1; it answers with the distribution of the token at
i + 2 and a feature that stands in for the target's at i + 1. Drafting goes on from its own features. Its one-layer cache holds true
pairs only: what a draft adds is dropped, and the accepted tokens come again with the target's own features (EAGLE, 2401.15077,
section 4.1; positions of the pairs as in the released code).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.choice import TokenChooser
from paceline.drafting.heads.block import DecoderBlock
from paceline.drafting.heads.checkpoint import Checkpoint, read_head
from paceline.drafting.heads.target import DraftVocabulary, HeadTarget, check_precision
from paceline.drafting.options import whole
from paceline.drafting.temperature import DraftTemperature, check_draft_temperature
from paceline.drafting.tree_search import Children, Growth, expand_and_rerank
from paceline.errors import OptionError
from paceline.execution.kvcache import KVCache
from paceline.execution.linears import Linear
from paceline.records import Draft, Outlook, Verdict

_CHUNK = 512
"""Pairs of one pass, and most pairs that wait for the next draft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentOptions:
    """Settings of `eagle:PATH` and `eagle3:PATH`."""

    temperature: float | str | None = None
    """As in `model`: temperature of the draft when the target samples; None: the target's; `auto`: tuned."""
    precision: str = "auto"
    """Of the head's matrices; `auto`: the target's own, but at least 8 bits."""
    tree_width: int = 4
    """Tree form: children of a node, and nodes that are expanded in a level."""
    tree_levels: int = 6
    """Tree form: most passes of the head in a round, the one over the committed tokens included."""

    def __post_init__(self) -> None:
        check_draft_temperature(self.temperature)
        check_precision(self.precision)
        whole("tree_width", self.tree_width, 1, 16)
        whole("tree_levels", self.tree_levels, 1, 32)


class RecurrentHead(ABC):
    """The graph of a head; H is its hidden size. Holds no state of a sequence."""

    layers: tuple[int, ...]
    """Layers of the target whose states it reads."""
    block: DecoderBlock
    embedding: torch.Tensor
    """[vocab, H]."""
    output: Linear
    vocabulary: DraftVocabulary

    @abstractmethod
    def __init__(self, checkpoint: Checkpoint, target: HeadTarget) -> None:
        """Raises ModelError when the files do not make up the graph, or were made for another target."""

    @abstractmethod
    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """The target's states [T, layers, H_t] float32 as features [T, H] float32."""

    @abstractmethod
    def enter(self, embedded: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block reads [T, I] and its residual stream [T, H], from embedded tokens and features, both [T, H] float32."""

    def leave(self, outputs: torch.Tensor) -> torch.Tensor:
        """What the output matrix reads, from the block's outputs [T, H]."""
        return outputs

    def feed_back(self, outputs: torch.Tensor) -> torch.Tensor:
        """The features of the next step, from the block's outputs [T, H]."""
        return outputs

    @torch.inference_mode()
    def read(self, states: torch.Tensor) -> torch.Tensor:
        """`fuse`, outside of autograd."""
        return self.fuse(states)

    @torch.inference_mode()
    def run(
        self, cache: KVCache, tokens: Sequence[int], features: torch.Tensor, parents: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The block's outputs [T, H] float32 of new pairs, which the caller commits in `cache` or lets go."""
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.embedding.device)
        embedded = F.embedding(ids, self.embedding).float()
        return self.block(*self.enter(embedded, features), cache, parents)

    @torch.inference_mode()
    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[R, V] float32 from outputs of the block [R, H]; minus infinity outside the draft's vocabulary."""
        return self.vocabulary.widen(self.output(self.leave(outputs)).float())

    @property
    def weight_bytes(self) -> int:
        embedding = self.embedding.numel() * self.embedding.element_size()
        return self.block.weight_bytes + self.output.weight_bytes + embedding


class RecurrentDrafter(Drafter):
    """Chains drawn from the head's distribution (greedy: its most probable tokens), or trees of its most probable continuations."""

    options_type = RecurrentOptions
    samples = True
    method: ClassVar[str]
    head_type: ClassVar[type[RecurrentHead]]

    def __init__(
        self, head: RecurrentHead, target: HeadTarget, name: str, options: RecurrentOptions, *, tree: bool = False
    ) -> None:
        self.head = head
        self.wants_hidden = head.layers
        self.name = name
        self.options = options
        self.tree = tree
        self.vocab_size = target.draft_vocab
        self.max_context = target.max_context
        self.temperature = DraftTemperature(options.temperature)

    @classmethod
    def build(cls, spec: DrafterSpec, options: RecurrentOptions, context: DrafterContext) -> RecurrentDrafter:
        target = HeadTarget.of(spec, context, options.precision)
        checkpoint = read_head(spec.argument)
        if checkpoint.method != cls.method:
            raise OptionError(
                f"draft = '{spec}': the files hold an {checkpoint.method} head; write {checkpoint.method}:{spec.argument}"
            )
        return cls(cls.head_type(checkpoint, target), target, str(spec), options, tree=spec.tree)

    def open(self, view: SequenceView) -> RecurrentSession:
        return RecurrentTreeSession(self, view) if self.tree else RecurrentSession(self, view)

    def memory_bytes(self) -> int:
        return self.head.weight_bytes


class RecurrentSession(DraftSession):
    """The head's cache of one sequence.

    Invariant: the cache holds the pairs of the first positions, `_waiting` the target's states of those that follow; together they
    are all positions but the pending token's, as long as every state was seen from the start.
    """

    def __init__(self, drafter: RecurrentDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._head = drafter.head
        self._view = view
        self._cache = KVCache(1, drafter.max_context)
        self._waiting: list[torch.Tensor] = []
        self._num_waiting = 0
        self._tip: torch.Tensor | None = None
        """[1, H]: the block's output for the newest pair."""
        self._tip_logits: torch.Tensor | None = None
        """[1, V], once they were asked for."""
        sampling = view.sampling
        self._chooser = TokenChooser(
            view, drafter.temperature.sampling_of(sampling), drafter.vocab_size, drafter.temperature.tuner(sampling)
        )

    @property
    def cached_pairs(self) -> int:
        """Pairs in the head's cache."""
        return self._cache.length

    def follow(self, hidden: torch.Tensor) -> None:
        self._waiting.append(hidden)
        self._num_waiting += len(hidden)
        if self._num_waiting > _CHUNK:
            self._catch_up()

    def outlook(self, max_tokens: int) -> Outlook:
        pairs = len(self._view.tokens) - 1
        complete = 0 < pairs == self._cache.length + self._num_waiting
        return Outlook(self._drafter.name, max(0, max_tokens) if complete else 0, catch_up=max(0, self._num_waiting - 1))

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        if num_tokens < 1 or self.outlook(num_tokens).available < 1:
            return Draft((), drafter=self._drafter.name)
        output, logits = self._start()
        chosen = self._chooser.begin()
        true_pairs = self._cache.length
        try:
            while True:
                features = chosen.add(logits[0])
                token = chosen.tokens[-1]
                done = len(chosen.tokens) >= num_tokens or token in self._view.end_ids
                if done or not keep_drafting(features):
                    return chosen.draft(self._drafter.name)
                output = self._head.run(self._cache, [token], self._head.feed_back(output))
                self._cache.accept([0])
                logits = self._head.logits(output)
        finally:
            self._cache.truncate(true_pairs)

    def _start(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's output [1, H] and logits [1, V] after all committed tokens."""
        self._catch_up()
        assert self._tip is not None
        if self._tip_logits is None:
            self._tip_logits = self._head.logits(self._tip)
        return self._tip, self._tip_logits

    def _catch_up(self) -> None:
        """Read the pairs that wait; a state whose next token was cut off with the end of the text has no pair."""
        if not self._waiting:
            return
        states = torch.cat(self._waiting)
        self._waiting, self._num_waiting = [], 0
        first = self._cache.length + 1
        tokens = self._view.tokens[first : first + len(states)]
        for start in range(0, len(tokens), _CHUNK):
            part = tokens[start : start + _CHUNK]
            outputs = self._head.run(self._cache, part, self._head.read(states[start : start + len(part)]))
            self._cache.accept(range(len(part)))
            self._tip, self._tip_logits = outputs[-1:], None

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        self._chooser.learn(verdict)

    def close(self) -> None:
        self._cache.close()


class RecurrentTreeSession(RecurrentSession):
    """EAGLE-2's tree (2406.16858, section 4): the head's most probable continuations, chosen and not drawn at any temperature.

    A level is one pass over the tree so far, behind the true pairs; none of its rows is kept.
    """

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        options = self._drafter.options
        levels = min(options.tree_levels, num_tokens)
        if levels < 1 or self.outlook(num_tokens).available < 1:
            return Draft((), drafter=self._drafter.name)
        output, logits = self._start()
        inner: list[int] = []
        features = {-1: self._head.feed_back(output)}

        def expand(growth: Growth, frontier: Sequence[int]) -> list[Children]:
            rows = logits if frontier == [-1] else self._level(growth, inner, frontier, features)
            return [
                self._chooser.children(row, growth.path(node), options.tree_width) for node, row in zip(frontier, rows, strict=True)
            ]

        growth = expand_and_rerank(expand, num_tokens, width=options.tree_width, levels=levels, end_ids=self._view.end_ids)
        return growth.draft(num_tokens, self._drafter.name)

    def _level(self, growth: Growth, inner: list[int], frontier: Sequence[int], features: dict[int, torch.Tensor]) -> torch.Tensor:
        """Logits [frontier, V]. inner: nodes of earlier levels, to which the frontier is added; features: what each node said."""
        inner += frontier
        place = {-1: -1} | {node: i for i, node in enumerate(inner)}
        said = torch.cat([features[growth.parents[node]] for node in inner])
        parents = [place[growth.parents[node]] for node in inner]
        outputs = self._head.run(self._cache, [growth.tokens[node] for node in inner], said, parents)[-len(frontier) :]
        for node, row in zip(frontier, self._head.feed_back(outputs), strict=True):
            features[node] = row[None]
        return self._head.logits(outputs)
