"""The loop over toy models: whatever drafts and decides, the text is the target's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from paceline.config import SamplingParams, SpeculationConfig
from paceline.control import registry as controllers
from paceline.costs import CostTable, DraftCost
from paceline.drafting import registry as drafting
from paceline.drafting.base import Drafter, DrafterContext
from paceline.engine import Engine
from paceline.errors import CacheError, ModelError, OptionError, PromptError
from paceline.execution.base import ForwardOutput, Segment
from toys import Language, ToyRunner, next_token_language, noisy_language, random_language

VOCAB = 12
PROMPT = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
DRAFTS = ("ngram", "suffix", "token_recycling", "stand", "model:toy", "ngram,model:toy")
TREES = tuple(f"{name}+tree" for name, entry in drafting.TABLE.items() if entry.tree and not entry.argument)


def drafters(spec: str, language: Language, vocab: int = VOCAB, noise: float = 1.0) -> list[Drafter]:
    draft = noisy_language(language, noise)
    context = DrafterContext(vocab_size=vocab, max_context=256, open_model=lambda _: ToyRunner(draft, vocab))
    return drafting.create_all(spec, {}, context)


def make_engine(
    spec: str = "none",
    *,
    controller: str = "fixed",
    k: int = 4,
    language: Language | None = None,
    vocab: int = VOCAB,
    max_context: int = 256,
    rule: str = "auto",
) -> Engine:
    language = language or random_language(vocab, order=2, seed=3, scale=1.0)
    made = drafters(spec, language, vocab)
    costs = CostTable([1, 2, 17], [1], [[1e-3, 1.05e-3, 1.5e-3]], drafters={d.name: DraftCost(fixed=1e-6) for d in made})
    options = {"num_draft": k} if controller == "fixed" else {}
    return Engine(
        ToyRunner(language, vocab, max_context=max_context),
        costs=costs,
        controller=controllers.create(controller, costs, options),
        drafters=made,
        speculation=SpeculationConfig(rule=rule),
    )


def run(engine: Engine, **params: object) -> tuple[int, ...]:
    return engine.generate(PROMPT, SamplingParams(**{"max_tokens": 40, **params})).token_ids  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [*DRAFTS, *TREES])
def test_greedy_tokens_are_those_of_plain_decoding_for_every_draft_length(spec: str) -> None:
    plain = run(make_engine())
    assert len(plain) == 40
    for k in LENGTHS:
        assert run(make_engine(spec, k=k)) == plain, k
    assert run(make_engine(spec, controller="pacer")) == plain


@pytest.mark.parametrize("spec", [*DRAFTS, *TREES])
def test_a_seeded_text_does_not_depend_on_draft_or_length(spec: str) -> None:
    plain = run(make_engine(), temperature=1.0, seed=5)
    for k in (1, 3, 8):
        assert run(make_engine(spec, k=k), temperature=1.0, seed=5) == plain, k
    assert run(make_engine(), temperature=1.0, seed=6) != plain


def pairs_law(language: Language, prompt: Sequence[int], vocab: int) -> np.ndarray:
    """Probability of each pair of first tokens, by enumeration."""

    def law(tokens: tuple[int, ...]) -> np.ndarray:
        z = language(tokens)
        e = np.exp(z - z.max())
        return e / e.sum()

    first = law(tuple(prompt))
    return np.stack([first[a] * law((*prompt, a)) for a in range(vocab)])


@pytest.mark.parametrize("rule", ["auto", "leviathan", "match"])
@pytest.mark.parametrize("spec", [*DRAFTS, *TREES])
def test_sampled_pairs_follow_the_enumerated_law(spec: str, rule: str) -> None:
    if rule == "leviathan" and spec != "model:toy":
        pytest.skip("a ratio rule needs one drawn chain")
    vocab, count = 4, 3000
    language = random_language(vocab, order=1, seed=8, scale=1.0)
    engine = make_engine(spec, language=language, vocab=vocab, k=3, rule=rule)
    prompt = [0, 1, 2, 3, 0, 1]
    seen: Counter[tuple[int, ...]] = Counter()
    for first in range(0, count, 100):  # the third token, never looked at, lets two be drafted
        results = engine.generate(prompt, SamplingParams(max_tokens=3, temperature=1.0, n=100))
        seen.update(tuple(r.token_ids[:2]) for r in results)
        assert first < count
    want = pairs_law(language, prompt, vocab) * count
    got = np.array([[seen[a, b] for b in range(vocab)] for a in range(vocab)])
    assert got.sum() == count
    assert chisquare(got.ravel(), want.ravel()).pvalue > 1e-6


def test_samples_of_a_seeded_request_differ_and_repeat() -> None:
    engine = make_engine("ngram")
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=9, n=4)
    first, again = engine.generate(PROMPT, params), engine.generate(PROMPT, params)
    assert isinstance(first, list)
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert len({r.token_ids for r in first}) > 1


@pytest.mark.parametrize("spec", ["none", "ngram", "model:toy"])
def test_a_batch_gives_each_prompt_the_text_it_has_alone(spec: str) -> None:
    prompts = [PROMPT, [5, 6, 7], [3], [9, 9, 9, 9]]
    params = SamplingParams(max_tokens=20)
    alone = [make_engine(spec).generate(p, params).token_ids for p in prompts]
    together = make_engine(spec).generate(prompts, params)
    assert [r.token_ids for r in together] == alone


def test_a_draft_that_is_always_right_saves_target_passes() -> None:
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % 4)
    engine = make_engine("ngram", language=language, k=4)
    result = engine.generate([0, 1, 2, 3, 0, 1, 2, 3], SamplingParams(max_tokens=40))
    assert isinstance(engine.runner, ToyRunner)
    assert engine.runner.forwards < 15
    assert result.num_accepted == sum(result.from_draft)
    assert result.block_efficiency is not None
    assert result.block_efficiency > 4


def test_the_model_as_its_own_draft_is_always_accepted() -> None:
    language = random_language(VOCAB, order=1, seed=3)
    engine = make_engine(language=language)
    engine.drafters = drafters("model:toy", language, noise=0.0)
    result = engine.generate(PROMPT, SamplingParams(max_tokens=40))
    assert result.acceptance_rate == 1.0


def test_plain_calls_draft_nothing() -> None:
    result = make_engine("ngram").generate(PROMPT, SamplingParams(max_tokens=20), plain=True)
    assert result.num_drafted == 0
    assert result.num_rounds == 20


def test_a_stream_folds_to_the_generated_result() -> None:
    engine = make_engine("ngram")
    events = list(engine.stream(PROMPT, SamplingParams(max_tokens=20)))
    result = events[-1].result
    assert result is not None
    assert sum((e.token_ids for e in events), ()) == result.token_ids == run(make_engine("ngram"), max_tokens=20)
    assert sum((e.from_draft for e in events), ()) == result.from_draft
    assert [e.record for e in events] == list(result.steps)
    assert all(e.result is None for e in events[:-1])


def test_a_stream_that_is_closed_early_gives_its_sequences_back() -> None:
    engine = make_engine("ngram,model:toy")
    events = engine.stream(PROMPT, SamplingParams(max_tokens=20))
    next(events)
    assert isinstance(engine.runner, ToyRunner)
    assert engine.runner.open_sequences == 1
    events.close()  # type: ignore[attr-defined]
    assert engine.runner.open_sequences == 0


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_exactly_max_tokens_are_emitted_even_inside_an_accepted_block(max_tokens: int) -> None:
    result = make_engine("ngram", k=8).generate(PROMPT, SamplingParams(max_tokens=max_tokens))
    assert len(result.token_ids) == max_tokens == sum(s.num_emitted for s in result.steps) == len(result.from_draft)
    assert result.finish_reason == "length"


def test_a_stop_id_inside_an_accepted_block_cuts_ids_logprobs_and_flags_at_one_token() -> None:
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % 6)
    engine = make_engine("ngram", language=language, k=8)
    prompt = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]
    result = engine.generate(prompt, SamplingParams(max_tokens=40, stop_token_ids=(3,), logprobs=1))
    assert result.token_ids == (1, 2, 3)
    assert (result.finish_reason, result.stop_reason) == ("stop", 3)
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == [1, 2, 3]
    assert len(result.from_draft) == 3
    assert sum(s.num_emitted for s in result.steps) == 3


def test_logprobs_are_those_of_plain_decoding() -> None:
    params = SamplingParams(max_tokens=20, logprobs=2)
    plain = make_engine().generate(PROMPT, params).logprobs
    drafted = make_engine("ngram", k=6).generate(PROMPT, params).logprobs
    assert plain == drafted
    assert plain is not None
    assert all(entry.logprob <= 0 for entry in plain)


def test_min_tokens_keeps_stop_ids_out_until_then() -> None:
    language = next_token_language(VOCAB, lambda tokens: 3)
    result = make_engine("ngram", language=language).generate(
        PROMPT, SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=(3,))
    )
    assert 3 not in result.token_ids[:5]
    assert result.token_ids[5:] == (3,)


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.7}, {"frequency_penalty": 1.5}, {"presence_penalty": 2.0}])
def test_penalties_see_the_drafted_tokens_of_their_own_row(penalty: dict[str, float]) -> None:
    assert run(make_engine("ngram", k=6), **penalty) == run(make_engine(), **penalty) != run(make_engine())


def test_a_text_ends_where_the_context_does() -> None:
    result = make_engine("ngram", max_context=len(PROMPT) + 6).generate(PROMPT, SamplingParams(max_tokens=40))
    assert len(result.token_ids) == 6
    assert result.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt is empty"), ([VOCAB], "between 0 and 11"), ([-1], "between 0 and 11"), ([1] * 300, "shorten it by 45 or more")],
)
def test_a_bad_prompt_is_refused_with_the_remedy(prompt: list[int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        make_engine().generate(prompt)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="token ids"):
        make_engine().generate("hello")


def test_a_result_tells_the_memory_of_its_drafters() -> None:
    held = [
        make_engine(spec).generate(PROMPT, SamplingParams(max_tokens=20)).draft_bytes for spec in ("none", "ngram", "ngram,suffix")
    ]
    assert held[0] == 0
    assert held[0] < held[1] < held[2]


def test_a_stream_of_several_samples_is_refused_before_it_starts() -> None:
    with pytest.raises(OptionError, match="n = 2"):
        make_engine().stream(PROMPT, SamplingParams(n=2, temperature=1.0))


def test_an_unknown_token_in_logit_bias_is_refused() -> None:
    with pytest.raises(OptionError, match="logit_bias"):
        make_engine().generate(PROMPT, SamplingParams(logit_bias={VOCAB: 1.0}))


def test_rounds_in_which_a_runner_prepared_something_are_no_lesson() -> None:
    class Preparing(ToyRunner):
        rounds = 0

        def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
            self.rounds += 1
            return super().forward(segments, want_hidden=want_hidden)

        @property
        def warmup_seconds(self) -> float:
            return 0.1 * (self.rounds >= 5)

    engine = make_engine("none")
    engine.runner = Preparing(random_language(VOCAB, order=2, seed=3, scale=1.0), VOCAB)
    engine.runner.rounds = 1  # the prompt's pass comes on top
    result = engine.generate(PROMPT, SamplingParams(max_tokens=8))
    assert [step.warmup for step in result.steps] == [i in (0, 2) for i in range(8)]


def test_the_first_rounds_after_a_prompt_are_no_lesson_where_they_are_cold() -> None:
    engine = make_engine("none")
    engine.runner.cold_rounds = 3
    result = engine.generate(PROMPT, SamplingParams(max_tokens=8))
    assert [step.warmup for step in result.steps] == [i < 3 for i in range(8)]


def test_records_tell_which_nodes_of_a_tree_were_accepted_and_how_likely_each_was() -> None:
    result = make_engine("suffix+tree").generate(PROMPT * 4, SamplingParams(max_tokens=60))
    drafted = [step for step in result.steps if step.num_drafted]
    assert any(step.path for step in drafted)
    for step in drafted:
        assert len(step.chances) == step.num_drafted
        assert len(step.path) == step.num_accepted
        assert list(step.chances) == sorted(step.chances, reverse=True)
        assert all(0 <= node < step.num_drafted for node in step.path)


def test_controllers_learn_of_each_temperature_by_itself() -> None:
    engine = make_engine("ngram")
    tasks = []
    for temperature in (0.0, 0.7, 1.04, 100.0):
        result = engine.generate(PROMPT, SamplingParams(max_tokens=4, temperature=temperature, seed=1), task="chat")
        tasks.append({step.task for step in result.steps})
    assert tasks == [{"chat"}, {"chat@0.7"}, {"chat@1.0"}, {"chat@2.0"}]


def test_the_seed_of_a_stream_is_known_before_its_end() -> None:
    events = list(make_engine().stream(PROMPT, SamplingParams(max_tokens=4, temperature=1.0)))
    assert events[-1].result is not None
    assert {event.seed for event in events} == {events[-1].result.seed}


def test_an_engine_gives_its_threads_back_even_when_its_profile_cannot_be_kept(tmp_path: Path) -> None:
    class Runner(ToyRunner):
        ended = False

        def shutdown(self) -> None:
            self.ended = True

    (tmp_path / "folder").write_text("a file, where a folder should be")
    base = make_engine(controller="pacer")
    runner = Runner(random_language(VOCAB, order=2), VOCAB)
    engine = Engine(runner, costs=base.costs, controller=base.controller, profile=tmp_path / "folder" / "profile.json")
    with pytest.raises(CacheError):
        engine.close()
    assert runner.ended
