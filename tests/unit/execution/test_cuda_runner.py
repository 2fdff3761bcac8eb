"""The GPU runner's reference path (torch operators over packed weights and paged keys), on the CPU, against the stock model."""

from __future__ import annotations

import pytest
import torch

from paceline.config import RunnerConfig, SamplingParams
from paceline.drafting.base import DraftJob, SequenceView
from paceline.drafting.model import ModelDrafter
from paceline.errors import ModelError, OptionError, ResourceError
from paceline.execution.base import Decoding, Segment, prefill
from paceline.execution.cuda import memory
from paceline.execution.cuda.runner import CudaRunner
from paceline.execution.draws import DrawLaw
from paceline.records import DecodedToken, DraftFeatures
from paceline.sampling import CounterRandom, Purpose
from unit.execution.cuda_toys import MODELS, commit, error, logits_after, runner
from unit.execution.toy_sources import ToySource, random_tokens, stock_logits

TOLERANCE = {"bf16": 0.03, "int8": 0.06, "fp8": 0.15, "int4": 0.45}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_logits_are_those_of_the_stock_model(name: str, precision: str) -> None:
    tokens = random_tokens(150)
    assert error(logits_after(runner(name, precision), [], tokens), stock_logits(name, tokens)) < TOLERANCE[precision]


@pytest.mark.parametrize("name", MODELS)
def test_a_tree_gives_each_path_the_logits_of_its_chain(name: str) -> None:
    run, prefix, tokens = runner(name), random_tokens(120, 1), random_tokens(7, 2)
    tree = logits_after(run, prefix, tokens, [-1, 0, 0, 1, 1, 2, 3])
    for path in ([0, 1, 3, 6], [0, 1, 4], [0, 2, 5]):
        chain = stock_logits(name, [*prefix, *(tokens[i] for i in path)])[len(prefix) :]
        assert error(tree[path], chain) < 0.04


def test_after_a_rejection_the_cache_equals_one_built_afresh() -> None:
    run, prefix = runner("cuda_llama"), random_tokens(100, 1)
    sequence = run.open()
    prefill(run, sequence, prefix)
    run.forward([Segment(sequence, random_tokens(5, 2), [-1, 0, 0, 1, 2])])
    run.accept(sequence, [0, 2, 4])
    run.truncate(sequence, len(prefix) + 2)
    kept = [*prefix, *(random_tokens(5, 2)[i] for i in (0, 2))]
    got = run.forward([Segment(sequence, [7, 8])]).logits
    assert torch.allclose(got, logits_after(run, kept, [7, 8]), atol=1e-4)


def test_a_fork_shares_its_prefix_and_goes_its_own_way() -> None:
    run, prefix = runner("cuda_llama"), random_tokens(130, 3)
    sequence = run.open()
    commit(run, sequence, prefix)
    twin = run.fork(sequence)
    commit(run, twin, [1, 2, 3])
    alone = logits_after(run, prefix, [9])
    assert torch.allclose(run.forward([Segment(sequence, [9])]).logits, alone, atol=1e-4)
    assert torch.allclose(run.forward([Segment(twin, [9])]).logits, logits_after(run, [*prefix, 1, 2, 3], [9]), atol=1e-4)


@pytest.mark.parametrize("feed", [[5], [5, 6, 7], random_tokens(70)])
def test_decoding_ahead_is_greedy_and_commits_what_was_fed(feed: list[int]) -> None:
    run, prefix = runner("cuda_llama"), random_tokens(40, 4)
    sequence = run.open()
    commit(run, sequence, prefix)
    text = [*prefix, *feed]
    (decoded,) = run.decode_ahead([Decoding(sequence, feed, 4, lambda _: True)])
    assert sequence.length == len(text) + 3
    assert decoded.late is not None
    for token in decoded.settled():
        probs = logits_after(run, text[:-1], text[-1:])[0].softmax(-1)
        assert token.token == int(probs.argmax())
        assert token.largest == pytest.approx(float(probs.max()), rel=1e-2)
        assert token.entropy == pytest.approx(float(torch.special.entr(probs).sum()), rel=2e-2)
        assert token.margin == pytest.approx(float(probs.topk(2).values.diff().abs()), abs=5e-3)
        text.append(token.token)


@pytest.mark.parametrize(("stop", "count"), [(1, 2), (3, 4), (4, 4), (9, 4)])
def test_a_stop_brings_along_the_token_that_was_under_way(stop: int, count: int) -> None:
    run, prefix = runner("cuda_llama"), random_tokens(40, 4)
    sequence, asked = run.open(), []
    commit(run, sequence, prefix)

    def keep_on(token: DecodedToken) -> bool:
        asked.append(token.token)
        return len(asked) < stop

    decoded = [token.token for token in run.decode_ahead([Decoding(sequence, [5], 4, keep_on)])[0].settled()]
    assert len(decoded) == count
    assert asked == decoded[: min(stop, 3)]  # nothing can follow the fourth
    assert sequence.length == len(prefix) + count
    got = run.forward([Segment(sequence, decoded[-1:])]).logits
    assert torch.allclose(got, logits_after(run, [*prefix, 5, *decoded[:-1]], decoded[-1:]), atol=1e-3)


def test_a_draft_decoded_ahead_is_the_one_made_token_by_token() -> None:
    run, prefix = runner("cuda_llama"), random_tokens(30, 5)
    view = SequenceView(1, list(prefix), len(prefix), SamplingParams(), seed=1)
    ahead, single = (ModelDrafter(run).open(view) for _ in range(2))
    single._streams = False
    asked: list[int] = []

    def keep(features: DraftFeatures) -> bool:
        asked.append(features.position)
        return features.position < 6

    one, other = ahead.propose(9, keep), single.propose(9, keep)
    assert asked == [*range(1, 7)] * 2
    assert one.tokens[:6] == other.tokens
    assert len(one.tokens) == 7  # the one that was under way
    assert one.confidences[:6] == pytest.approx(other.confidences, rel=1e-3)
    view.tokens += [*one.tokens[:2], 11]  # two were accepted, then the target's own
    assert ahead.outlook(4).catch_up == 0
    assert ahead.propose(3, keep).tokens == single.propose(3, keep).tokens


def test_sequences_decode_ahead_together_as_each_does_alone() -> None:
    run, law = runner("cuda_llama"), DrawLaw(1.0, top_k=20)
    jobs = []
    for i, (feed, most) in enumerate((([5], 5), ([6, 7], 2), (random_tokens(70, 9), 3))):
        pair = run.open(), run.open()
        for sequence in pair:
            commit(run, sequence, random_tokens(30 + i, i))
        numbers = [CounterRandom(i).bits(k, Purpose.TARGET) for k in range(most)]
        drawn = law if i else None
        jobs.append([Decoding(sequence, feed, most, lambda t: t.token % 3 != 0, drawn, numbers if i else ()) for sequence in pair])
    together = run.decode_ahead([job for job, _ in jobs])
    for found, (job, single) in zip(together, jobs, strict=True):
        tokens, alone = found.settled(), run.decode_ahead([single])[0].settled()
        assert [t.token for t in tokens] == [t.token for t in alone]
        assert 1 <= len(tokens) <= job.most
        assert job.sequence.length == single.sequence.length
    for job, single in jobs:
        run.close(job.sequence)
        run.close(single.sequence)


def test_a_draw_without_its_random_numbers_is_refused() -> None:
    run = runner("cuda_llama")
    with pytest.raises(OptionError, match="random number for each token"):
        run.decode_ahead([Decoding(run.open(), [5], 2, lambda _: True, DrawLaw(1.0), [1])])


def test_memory_that_runs_out_for_some_of_a_batch_leaves_those_without_a_draft() -> None:
    run = CudaRunner(ToySource("cuda_llama"), device="cpu", max_context=192, memory_bytes=4 << 30)
    views = [SequenceView(i, random_tokens(100, i), 100, SamplingParams(), seed=1) for i in range(2)]
    drafter = ModelDrafter(run)
    sessions = [drafter.open(view) for view in views]
    with torch.inference_mode():
        while run._cache.free_pages > 3:  # others take what there is
            run._cache.stage(run.open(), 64 * min(3, run._cache.free_pages - 3))
    with pytest.warns(RuntimeWarning, match="left out of this request"):
        drafts = drafter.propose_together([DraftJob(session, 3, lambda _: True) for session in sessions])
    assert sorted(len(draft) for draft in drafts) == [0, 3]
    left = next(session for session, draft in zip(sessions, drafts, strict=True) if draft.tokens)
    assert left.cached_tokens == 102


def test_nothing_is_drafted_behind_an_end_token() -> None:
    run, prefix = runner("cuda_llama"), random_tokens(30, 5)
    view = SequenceView(1, list(prefix), len(prefix), SamplingParams(), seed=1)
    tokens = ModelDrafter(run).open(view).propose(5, lambda _: True).tokens
    view.end_ids = frozenset(tokens[1:2])
    session = ModelDrafter(run).open(view)
    first = tokens.index(tokens[1]) + 1
    assert session.propose(5, lambda _: True).tokens == tokens[:first]
    view.tokens += [*tokens[:1], 11]
    assert session.outlook(4).catch_up == 0
    assert session.cached_tokens == len(view.tokens) - 1


@pytest.mark.parametrize(
    ("name", "reason"), [("qwen3", "norms of queries"), ("gemma2", "norms behind"), ("phi", "model_type"), ("llama", "head size 8")]
)
def test_what_the_kernels_do_not_know_is_refused_with_its_reason(name: str, reason: str) -> None:
    assert reason in str(CudaRunner.unsupported_reason(ToySource(name), "bf16"))
    with pytest.raises(ModelError, match=f"{reason}.*use backend = 'hf'"):
        CudaRunner(ToySource(name), device="cpu")


def test_an_unknown_precision_is_refused() -> None:
    assert "fp32" in str(CudaRunner.unsupported_reason(ToySource("cuda_llama"), "fp32"))


def test_a_model_that_does_not_fit_is_refused_with_the_budget() -> None:
    with pytest.raises(ResourceError, match=r"weights .* reserve 1\.00 GiB.*lower max_context"):
        CudaRunner(ToySource("cuda_llama"), device="cpu", memory_bytes=1 << 30)


@pytest.mark.parametrize(
    "segment",
    [
        {"tokens": []},
        {"tokens": [97]},
        {"tokens": [1, 2], "parents": [-1]},
        {"tokens": list(range(65)), "parents": [-1, *range(64)]},
        {"tokens": [1], "num_logits": 2},
    ],
)
def test_segments_that_make_no_sense_are_refused(segment: dict[str, object]) -> None:
    run = runner("cuda_llama")
    with pytest.raises(OptionError):
        run.forward([Segment(run.open(), **segment)])  # type: ignore[arg-type]


def test_a_sequence_may_not_appear_twice_nor_come_from_elsewhere() -> None:
    run = runner("cuda_llama")
    sequence = run.open()
    with pytest.raises(OptionError, match="only once"):
        run.forward([Segment(sequence, [1]), Segment(sequence, [2])])
    with pytest.raises(OptionError, match="another runner"):
        run.forward([Segment(object(), [1])])  # type: ignore[arg-type]


def test_a_model_that_was_offloaded_is_brought_back_by_the_next_forward() -> None:
    run, tokens = CudaRunner(ToySource("cuda_llama"), device="cpu", memory_bytes=4 << 30), random_tokens(20)
    before = logits_after(run, [], tokens)
    assert run.offload() == run.budget.weights
    assert run.offload() == 0
    assert run.is_offloaded
    assert torch.equal(logits_after(run, [], tokens), before)
    assert not run.is_offloaded


def test_another_models_weights_leave_before_a_forward_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = (CudaRunner(ToySource("cuda_qwen2"), p, device="cpu", memory_bytes=4 << 30) for p in ("bf16", "int4"))
    monkeypatch.setattr(memory, "_holders", {target, draft})
    whole, short_of = target._decoder.dense, [True]

    def dense(*arguments: object) -> object:
        if short_of and not draft.is_offloaded:
            raise torch.OutOfMemoryError("no room")
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(target._decoder, "dense", dense)
    sequence = target.open()
    assert target.forward([Segment(sequence, [1, 2])]).logits.shape == (2, 97)
    assert draft.is_offloaded
    target.accept(sequence, [0, 1])
    monkeypatch.setattr(memory, "_holders", {target})
    monkeypatch.setattr(draft, "is_offloaded", False)
    with pytest.raises(ResourceError, match=r"out of memory in a forward \(weights .*; use fewer sequences"):
        target.forward([Segment(sequence, [3])])


def test_a_draft_does_not_drive_its_target_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = (CudaRunner(ToySource("cuda_qwen2"), p, device="cpu", memory_bytes=4 << 30) for p in ("bf16", "int4"))
    monkeypatch.setattr(memory, "_holders", {target, draft})
    assert memory.make_room(draft) == 0
    assert not target.is_offloaded
    assert memory.make_room(target) == draft.budget.weights


def test_what_runners_hold_is_counted_for_a_common_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_holders", set())
    first, second = (CudaRunner(ToySource("cuda_llama"), p, device="cpu", memory_bytes=4 << 30) for p in ("bf16", "int8"))
    assert memory.held("cpu") == first.budget.used + second.budget.used
    second.shutdown()
    assert memory.held("cpu") == first.budget.used
    assert memory.held("cuda:0") == 0


def test_a_draft_whose_memory_runs_out_is_left_out_and_the_request_goes_on() -> None:
    run = CudaRunner(ToySource("cuda_llama"), device="cpu", max_context=192, memory_bytes=4 << 30)
    view = SequenceView(1, random_tokens(100), 100, SamplingParams(), seed=1)
    session = ModelDrafter(run).open(view)
    with torch.inference_mode():
        while run._cache.free_pages > 1:  # others take what there is
            run._cache.stage(run.open(), 128)
    with pytest.warns(RuntimeWarning, match="left out of this request: memory for keys and values is used up"):
        assert session.propose(4, lambda _: True).tokens == ()
    assert session.outlook(4).available == 0
    assert session.propose(4, lambda _: True).tokens == ()
    session.observe(None, None)
    session.close()


@pytest.mark.parametrize("memory_gb", [0, -1.0, float("inf")])
def test_a_budget_that_is_no_amount_is_refused(memory_gb: float) -> None:
    with pytest.raises(OptionError, match="memory_gb"):
        RunnerConfig(memory_gb=memory_gb)
