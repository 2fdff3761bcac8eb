"""The CUDA kernels against the reference path, and against themselves in other batches. Need a GPU; skipped elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from paceline.config import SamplingParams
from paceline.execution.base import Decoding, Segment
from paceline.execution.cuda.drawing import Drawer
from paceline.execution.cuda.driver import missing_reason
from paceline.execution.cuda.linears import PackedLinear
from paceline.execution.cuda.packing import FORMATS, column_tiles, from_column_tiles, row_order, unpack
from paceline.execution.cuda.runner import CudaRunner
from paceline.execution.cuda.stepping import reference_steps
from paceline.execution.draws import DrawLaw, Draws, draw_from, draw_rows, row_weights
from paceline.sampling import CounterRandom, Purpose
from unit.execution.cuda_toys import MODELS, check_texts, commit, error, logits_after, runner
from unit.execution.toy_sources import random_tokens

_ABSENT = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0) or missing_reason() is not None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_ABSENT, reason="needs a GPU of compute capability 9.0 and cuda-bindings")]

TREE = [-1, 0, 0, 1, 1, 2, 3, 6, 7, 4]
PATH = [0, 1, 3, 6, 7, 8]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(960, 576), (1024, 4608), (40000, 128)])
def test_products_are_right_and_a_row_has_the_same_bits_in_any_company(format: str, shape: tuple[int, int]) -> None:
    linear = PackedLinear(torch.randn(*shape, device="cuda") * 0.05, format)
    x = torch.randn(64, shape[1], device="cuda").to(torch.bfloat16)
    tiles, want = column_tiles(x).contiguous(), x.double() @ unpack(linear.packed).double().T
    whole = torch.full((64, shape[0]), float("nan"), device="cuda")
    linear.launch("logits", 64, tiles, whole, out_stride=shape[0])
    assert error(whole, want) < 1e-4
    for rows in (1, 2, 8, 9, 17, 25, 33, 41, 49, 57):
        out = torch.full_like(whole, float("nan"))
        linear.launch("logits", rows, tiles, out, out_stride=shape[0])
        assert torch.equal(out[:rows], whole[:rows])
        assert out[rows:].isnan().all()


@pytest.mark.parametrize("format", FORMATS)
def test_the_library_gets_the_weights_that_the_kernels_multiply_with(format: str) -> None:
    linear = PackedLinear(torch.randn(300, 320, device="cuda"), format)
    assert error(linear._unpacked(torch.bfloat16), unpack(linear.packed)) < 4e-3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_a_norm_a_gate_and_a_residual_are_applied_on_the_way_out(format: str, rows: int) -> None:
    inputs, units = 512, 256
    x = torch.randn(64, inputs, device="cuda").to(torch.bfloat16)
    squares = x.float().square().view(64, inputs // 16, 16).sum(-1).T.contiguous()
    norm = torch.rsqrt(x[:rows].double().square().mean(-1, keepdim=True) + 1e-5)
    weight = torch.randn(2 * units, inputs, device="cuda") * 0.05
    gated = PackedLinear(weight, format, kind="gated")
    used = torch.empty(2 * units, inputs, dtype=torch.float64, device="cuda")
    used[row_order("gated", 2 * units).cuda()] = unpack(gated.packed).double()
    gate, up = (x[:rows].double() @ used.T * norm).chunk(2, -1)
    out = torch.zeros(64, units, device="cuda", dtype=torch.bfloat16)
    tiles = column_tiles(x).contiguous()
    gated.launch("gated", rows, tiles, out, gelu=0, squares=squares, num_squares=inputs // 16, inv_width=1 / inputs, eps=1e-5)
    assert error(from_column_tiles(out)[:rows], F.silu(gate) * up) < 4e-3

    plain = PackedLinear(torch.randn(512, inputs, device="cuda") * 0.05, format)
    old = torch.randn(64, 512, device="cuda").to(torch.bfloat16)
    new, sums = column_tiles(old).contiguous(), torch.zeros(32, 64, device="cuda")
    plain.launch("residual", rows, tiles, new, out_squares=sums)
    written = from_column_tiles(new)
    assert error(written[:rows], old[:rows].double() + x[:rows].double() @ unpack(plain.packed).double().T) < 4e-3
    assert torch.equal(written[rows:], old[rows:])
    assert torch.allclose(sums[:, :rows].sum(0), written[:rows].float().square().sum(1), rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [0, 5, 64, 130, 700])
def test_logits_are_those_of_the_reference(name: str, length: int) -> None:
    prefix, tokens = random_tokens(length, 1), random_tokens(len(TREE), 2)
    for precision in ("bf16", "int4"):
        got = logits_after(runner(name, precision, "cuda"), prefix, tokens, TREE)
        assert error(got, logits_after(runner(name, precision), prefix, tokens, TREE)) < 0.03


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [5, 127, 700])
def test_a_row_has_the_same_bits_alone_in_a_chain_in_a_tree_and_in_a_batch(name: str, precision: str, length: int) -> None:
    run = runner(name, precision, "cuda")
    prefix, tokens = random_tokens(length, 3), random_tokens(len(TREE), 4)
    sequence = run.open()
    commit(run, sequence, prefix)
    tree = run.forward([Segment(sequence, tokens, TREE)]).logits.clone()
    chain = run.forward([Segment(sequence, [tokens[i] for i in PATH])]).logits.clone()
    assert torch.equal(chain, tree[PATH])
    twin, filler = run.fork(sequence), run.open()
    commit(run, filler, prefix[:5])
    batch = [Segment(filler, random_tokens(23, 5)), Segment(twin, tokens[:1]), Segment(sequence, tokens, TREE)]
    assert torch.equal(run.forward(batch).logits[23:], torch.cat([tree[:1], tree]))
    for row, node in enumerate(PATH):
        assert torch.equal(run.forward([Segment(twin, [tokens[node]])]).logits[0], chain[row])
        run.accept(twin, [0])
    for handle in (sequence, twin, filler):
        run.close(handle)


def test_accepting_a_path_of_a_tree_leaves_the_cache_of_its_chain() -> None:
    run, prefix, tokens = runner("cuda_llama", "bf16", "cuda"), random_tokens(200, 3), random_tokens(len(TREE), 4)
    one, other = run.open(), run.open()
    for sequence in (one, other):
        commit(run, sequence, prefix)
    run.forward([Segment(one, tokens, TREE)])
    run.accept(one, PATH)
    run.forward([Segment(other, [tokens[i] for i in PATH])])
    run.accept(other, range(len(PATH)))
    assert torch.equal(run.forward([Segment(one, [7, 8])]).logits.clone(), run.forward([Segment(other, [7, 8])]).logits)


def test_the_best_token_is_the_lowest_of_the_largest_logits() -> None:
    run = runner("cuda_qwen2", "int8", "cuda")
    out = run.forward([Segment(run.open(), random_tokens(30))])
    assert out.best == out.logits.argmax(-1).tolist()


@pytest.mark.parametrize("feed", [[5], [5, 6, 7], list(range(64))])
def test_decoding_ahead_equals_single_forwards(feed: list[int]) -> None:
    run, prefix = runner("cuda_llama", "bf16", "cuda"), random_tokens(120, 6)
    ahead, alone = run.open(), run.open()
    for sequence in (ahead, alone):
        commit(run, sequence, prefix)
    for stop, most in ((9, 9), (3, 9), (1, 1)):  # the second one with a token under way
        answers = iter([True] * (stop - 1) + [False])
        (got,) = run.decode_ahead([Decoding(ahead, feed, most, lambda _, answers=answers: next(answers))])
        read = reference_steps(run, [Decoding(alone, feed, most, lambda _: True)], [feed]).read
        want = [read()[0] for _ in range(min(stop + 1, most))]
        assert got.late is not None
        assert [token.token for token in got.settled()] == [token.token for token in want]
        for ours, theirs in zip(got.settled(), want, strict=True):
            assert (ours.largest, ours.entropy, ours.margin) == pytest.approx(
                (theirs.largest, theirs.entropy, theirs.margin), rel=1e-3, abs=1e-4
            )
        assert ahead.length == alone.length
    assert torch.equal(run.forward([Segment(ahead, [3])]).logits.clone(), run.forward([Segment(alone, [3])]).logits)


LAWS = (DrawLaw(1.0), DrawLaw(0.7, top_k=40), DrawLaw(1.2, top_p=0.9), DrawLaw(0.9, 60, 0.8, 0.02), DrawLaw(2.0, vocab_size=900))


@pytest.mark.parametrize("vocab", [97, 1000, 49152])
def test_a_draw_is_that_of_the_readable_form(vocab: int) -> None:
    rows, generator = 64, torch.Generator("cuda").manual_seed(vocab)
    logits = 4 * torch.randn(rows, vocab + 7, generator=generator, device="cuda")
    logits[3, : vocab // 2] = float("-inf")
    logits[4] = logits[4].round()  # ties
    best = logits[:, :vocab].argmax(-1).int()
    best[5] = -1
    drawer = Drawer(rows, vocab, torch.device("cuda"), torch.zeros(rows, dtype=torch.int32, device="cuda"))
    random = CounterRandom(3)
    for turn in range(3):
        laws: list[DrawLaw | None] = [None if row % 6 == 5 else LAWS[row % 6] for row in range(rows)]
        numbers = [random.bits(100 * turn + row, Purpose.TARGET) for row in range(rows)]
        drawer.describe(laws, numbers)
        drawer.launch(logits, best, rows)
        for row, (got, chance) in enumerate(zip(drawer.tokens.tolist(), drawer.chances.tolist(), strict=True)):
            law = laws[row]
            if law is None or best[row] < 0:
                assert (got, chance) == (int(best[row]), -1.0)
                continue
            weights = row_weights(logits[row, :vocab], law)
            assert got == draw_from(weights, numbers[row])
            assert chance == pytest.approx(weights[got] / weights.sum(), rel=1e-5)


@pytest.mark.parametrize("parents", [None, TREE])
def test_a_forward_draws_what_the_readable_form_draws_from_its_rows(parents: list[int] | None) -> None:
    run, prefix, tokens = runner("cuda_llama", "bf16", "cuda"), random_tokens(90, 3), random_tokens(len(TREE), 4)
    one, other = run.open(), run.open()
    for sequence in (one, other):
        commit(run, sequence, prefix)
    draws = Draws(DrawLaw(0.8, top_p=0.95), [CounterRandom(1).bits(i, Purpose.TARGET) for i in range(len(TREE))])
    out = run.forward([Segment(other, [7]), Segment(one, tokens, parents, draws=draws)])
    assert out.best is not None
    assert out.drawn == [out.best[0], *draw_rows(out.logits[1:], draws, len(TREE))]
    last = run.forward([Segment(one, tokens, parents, num_logits=2, draws=draws)])
    assert last.drawn == out.drawn[-2:]
    assert run.forward([Segment(other, [7])]).drawn is None


@pytest.mark.parametrize("law", [None, DrawLaw(0.9, top_k=30)])
def test_sequences_that_decode_ahead_together_get_what_each_gets_alone(law: DrawLaw | None) -> None:
    run = runner("cuda_llama", "bf16", "cuda")
    jobs, alone = [], []
    for i, (feed, most) in enumerate((([5], 9), (random_tokens(40, 8), 4), ([1, 2, 3], 12), ([9], 7), (random_tokens(30, 9), 6))):
        sequences = run.open(), run.open()
        for sequence in sequences:
            commit(run, sequence, random_tokens(60 + 13 * i, i))
        numbers = [CounterRandom(i).bits(k, Purpose.TARGET) for k in range(most)] if law is not None else []
        jobs.append(Decoding(sequences[0], feed, most, lambda token: token.token % 5 != 0, law, numbers))
        alone.append(Decoding(sequences[1], feed, most, lambda token: token.token % 5 != 0, law, numbers))
    got = run.decode_ahead(jobs)
    for job, single, found in zip(jobs, alone, got, strict=True):
        (want,) = run.decode_ahead([single])
        assert found.settled() == want.settled()
        assert job.sequence.length == single.sequence.length
        assert torch.equal(
            run.forward([Segment(job.sequence, [3])]).logits.clone(), run.forward([Segment(single.sequence, [3])]).logits
        )
        run.close(job.sequence)
        run.close(single.sequence)


def test_drawn_steps_are_those_of_single_forwards() -> None:
    run, prefix = runner("cuda_llama", "bf16", "cuda"), random_tokens(120, 6)
    ahead, alone = run.open(), run.open()
    for sequence in (ahead, alone):
        commit(run, sequence, prefix)
    for turn in range(40):  # round and round the lines that numbers are sent in
        numbers = [CounterRandom(turn).bits(k, Purpose.TARGET) for k in range(9)]
        law = DrawLaw(1.0, top_p=0.9)
        (got,) = run.decode_ahead([Decoding(ahead, [5, 6], 9, lambda _: True, law, numbers)])
        read = reference_steps(run, [Decoding(alone, [5, 6], 9, lambda _: True, law, numbers)], [[5, 6]]).read
        want = [read()[0] for _ in range(9)]
        assert [token.token for token in got.settled()] == [token.token for token in want]
        assert [token.chance for token in got.settled()] == pytest.approx([token.chance for token in want], rel=1e-4)
        for sequence in (ahead, alone):
            run.truncate(sequence, len(prefix))


@pytest.mark.parametrize("num_draft", [1, 4, 15])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=40),
        SamplingParams(max_tokens=40, temperature=0.8, seed=4),
        SamplingParams(max_tokens=40, temperature=1.0, top_k=30, top_p=0.9, min_p=0.01, seed=4),
    ],
)
def test_texts_are_the_same_alone_in_a_batch_plain_and_drafted(params: SamplingParams, num_draft: int) -> None:
    check_texts(runner("cuda_llama", "bf16", "cuda"), runner("cuda_llama", "int8", "cuda"), params, num_draft)


def test_plain_and_speculative_kernels_agree_without_overlap_too() -> None:
    from paceline.execution.cuda.linears import Tuning
    from unit.execution.toy_sources import ToySource

    serial = CudaRunner(ToySource("cuda_llama"), "bf16", "cuda", memory_bytes=4 << 30, tuning=Tuning(overlap=False))
    prefix, tokens = random_tokens(300, 1), random_tokens(12, 2)
    got = logits_after(serial, prefix, tokens)
    assert torch.equal(got, logits_after(runner("cuda_llama", "bf16", "cuda"), prefix, tokens))
