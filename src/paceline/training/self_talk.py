"""A model talks to itself: it writes the user's turn, then answers it, so that no data set is needed (Magpie, 2406.08464).

An instruction-tuned model that is given its chat template up to where the user would speak goes on with what a user might say.
Left alone it comes back to the same few subjects, so most turns begin with one of many common openings (ours).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from paceline.config import SamplingParams
from paceline.drafting.options import whole
from paceline.engine import Engine
from paceline.errors import OptionError
from paceline.models.base import Tokenizer
from paceline.records import GenerationResult
from paceline.study.prompts import encode_prompt
from paceline.training.answers import MARK, make_answer
from paceline.training.ngram_table import Answer

TURN_TOKENS, ANSWER_TOKENS = 110, 280
"""Most tokens of what the user says, and of the answer."""
COOLEST, WARMEST, TOP_K = 0.7, 1.05, 200
GREEDY_SHARE = 0.6
"""Of the answers; the others are sampled, as in use."""
_BEGINNINGS, _SAMPLES = 10, 3
"""Of one batch: 30 texts, where an engine decodes 32 together. The samples of a beginning differ in their seeds, but all beginnings
of a call have the same ones: see `_choose`."""

OPENINGS = (
    *("Write a", "Write an email", "Write a short story", "Write a function", "Write a Python program", "Write a SQL query"),
    *("Write a poem about", "Explain how", "Explain why", "Explain the difference between", "Describe", "Describe the process of"),
    *("What is", "What are", "What are the main", "What happens when", "What would", "Who was", "When did", "Where is", "Why do"),
    *("Why is", "How do I", "How does", "How can I", "How many", "Is it", "Can you", "Could you please", "Should I", "I am"),
    *("I have", "I need", "My", "Give me", "Give an example of", "List", "Name", "Suggest", "Create a", "Design a", "Help me"),
    *("Make a plan", "Compare", "Summarize:", "Summarize the following text:", "Read the passage:", "Translate German to English:"),
    *("Translate to French:", "Rewrite the sentence", "Correct the grammar:", "Classify", "Extract", "Answer the question:"),
    *("Question:", "Solve", "Calculate", "A store", "A train", "If a", "There are", "Implement", "Fix the bug in this code:"),
    *("Imagine", "Pretend you are", "Tell me about", "Let's", "The"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TalkOptions:
    """How many conversations, and which ones."""

    conversations: int = 2000
    seed: int = 0
    """Makes them repeat, with the same model on the same machine."""

    def __post_init__(self) -> None:
        whole("conversations", self.conversations, 1, 1 << 30)
        whole("seed", self.seed, 0, (1 << 63) - 1)


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the chat template puts around a user's turn."""

    before: str
    after: str


def converse(engine: Engine, options: TalkOptions) -> Iterator[Answer]:
    """The answers of conversations that a model holds with itself; about as many as asked for, since a turn may come out empty.

    Of sampled answers the most probable token at each position is given too. Raises OptionError, at once, for a model without a
    chat template; while it runs what `Engine.generate` raises.
    """
    return _conversations(engine, options, _stage_of(engine.tokenizer))


def _stage_of(tokenizer: Tokenizer) -> _Stage:
    if not tokenizer.has_chat_template:
        raise OptionError("conversations: this model has no chat template to talk to itself in; give answers with --answers")
    before, found, after = tokenizer.render_chat([{"role": "user", "content": MARK}]).partition(MARK)
    if not found:
        raise OptionError("conversations: this model's chat template shows no user's turn; give answers with --answers")
    return _Stage(before, after.strip())


def _conversations(engine: Engine, options: TalkOptions, stage: _Stage) -> Iterator[Answer]:
    """In batches of one temperature, since a call of the engine has one."""
    random = np.random.default_rng(options.seed)
    left = options.conversations
    while left > 0:
        samples = min(_SAMPLES, -(-left // _BEGINNINGS))
        beginnings = _choose(random)[: -(-left // samples)]
        temperature = float(random.uniform(COOLEST, WARMEST))
        seeds = random.integers(1 << 62, size=3).tolist()

        said = SamplingParams(
            max_tokens=TURN_TOKENS,
            temperature=temperature,
            top_k=TOP_K,
            n=samples,
            stop=(stage.after,) if stage.after else (),  # where the turn's end is no special token
        )
        opened, bare = [text for text in beginnings if text], [text for text in beginnings if not text]
        turns = _write_turns(engine, stage, opened, replace(said, seed=seeds[0]))
        turns = (turns + _write_turns(engine, stage, bare, replace(said, seed=seeds[1])))[:left]
        greedy = random.random(len(turns)) < GREEDY_SHARE
        sampled = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=temperature, top_k=TOP_K, seed=seeds[2], logprobs=1)
        for params, wanted in ((SamplingParams(max_tokens=ANSWER_TOKENS), greedy), (sampled, ~greedy)):
            yield from _answers(engine, [turn for turn, yes in zip(turns, wanted, strict=True) if yes], params)
        left -= len(turns)


def _choose(random: np.random.Generator) -> list[str]:
    """Beginnings of a batch, one of them empty.

    No opening is the beginning of another one: with one seed both would go on alike once the shorter one has drawn what the longer
    one says. For the same reason the empty one has a call of its own.
    """
    chosen: list[str] = []
    for opening in random.permutation(OPENINGS).tolist():
        if len(chosen) < _BEGINNINGS - 1 and not any(opening.startswith(c) or c.startswith(opening) for c in chosen):
            chosen.append(opening)
    chosen.insert(int(random.integers(_BEGINNINGS)), "")
    return chosen


def _write_turns(engine: Engine, stage: _Stage, beginnings: Sequence[str], params: SamplingParams) -> list[str]:
    """What the user says: each beginning and `params.n` ways in which the model goes on."""
    prompts = [engine.tokenizer.encode(stage.before + beginning, add_special=False) for beginning in beginnings]
    results = _generate(engine, prompts, params)
    return [beginnings[i // params.n] + result.text for i, result in enumerate(results)]


def _answers(engine: Engine, turns: list[str], params: SamplingParams) -> Iterator[Answer]:
    prompts = [encode_prompt(engine.tokenizer, turn) for turn in turns if turn.strip()]
    prompts = [prompt for prompt in prompts if len(prompt) < engine.runner.info.max_context]
    for prompt, result in zip(prompts, _generate(engine, prompts, params), strict=True):
        tops = None if result.logprobs is None else [chance.top[0][0] for chance in result.logprobs]
        yield make_answer(prompt, list(result.token_ids), tops)


def _generate(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[GenerationResult]:
    return engine.generate(prompts, params) if prompts else []
