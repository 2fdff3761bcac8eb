"""Heads in the engine: states reach them from every backend, and whatever they draft, the text is the target's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from paceline.assembly import Target, build_engine
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting import registry
from paceline.drafting.base import Drafter, DrafterContext
from paceline.engine import Engine
from paceline.execution.base import Runner, Segment, prefill
from paceline.execution.hf import HFRunner
from paceline.execution.lean import LeanRunner
from paceline.execution.native import build
from paceline.execution.native.runner import NativeRunner
from paceline.models.base import Tokenizer
from tiny_models import byte_level_tokenizer
from unit.drafting.heads_reference import (
    HIDDEN,
    SMALL_TARGET,
    SMALL_VOCAB,
    TARGET,
    Head,
    drafter_of,
    random_eagle,
    random_eagle3,
    random_medusa,
    target_states,
    write,
)
from unit.execution.toy_sources import CONFIGS, EXTRA_CONFIGS, ToySource, random_tokens, stock_logits, stock_model

BACKENDS = ["lean", "hf", *([] if isinstance(build.load_library(), str) else ["native"])]
METHODS = ["eagle", "eagle3", "medusa"]
FORMS = ["", "+tree"]
PROMPT = random_tokens(9, seed=4)
WORDS = "heads_words"
EXTRA_CONFIGS[WORDS] = {**EXTRA_CONFIGS[TARGET], "vocab_size": 275}


@lru_cache
def runner(backend: str, name: str = TARGET) -> Runner:
    source = ToySource(name)
    made = {"lean": LeanRunner, "hf": HFRunner, "native": NativeRunner}[backend]
    return made(source, "fp32")  # type: ignore[abstract]


def head_of(method: str, target: str = TARGET) -> Head:
    return {"eagle": random_eagle, "eagle3": random_eagle3, "medusa": random_medusa}[method](target=target)


def make(name: str, folder: Path, target: Runner, source: str = TARGET, **options: object) -> Drafter:
    """A drafter from `eagle`, `eagle3+tree`, ..., with a random head."""
    head = head_of(name.removesuffix("+tree"), source)
    return drafter_of(head, folder, target, tree=name.endswith("+tree"), **options)


def engine(target: Runner, drafters: Sequence[Drafter] = (), k: int = 4, **settings: object) -> Engine:
    costs = CostTable([1, 17], [1], [[1e-3, 1.5e-3]])
    controller = controllers.create("fixed", costs, {"num_draft": k})
    speculation = SpeculationConfig(**settings)  # type: ignore[arg-type]
    return Engine(target, costs=costs, controller=controller, drafters=drafters, speculation=speculation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_are_those_of_transformers(backend: str) -> None:
    run, tokens = runner(backend), random_tokens(20, seed=3)
    want = target_states(TARGET, tokens)
    layers = (0, 3, 3, 6)
    sequence, read = run.open(), []
    prefill(run, sequence, tokens[:12], chunk=5, taps=layers, listen=lambda hidden: read.append(hidden.clone()))
    assert [len(part) for part in read] == [5, 5, 2]
    last = run.forward_tapped([Segment(sequence, tokens[12:])], layers)
    assert last.taps is not None
    found = torch.cat([*read, last.taps])
    assert found.shape == (20, 4, HIDDEN)
    for column, layer in enumerate(layers):
        torch.testing.assert_close(found[:, column], want[layer], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last.logits, stock_logits(TARGET, tokens)[12:], rtol=1e-3, atol=1e-3)
    run.close(sequence)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_trees_and_batches_come_row_by_row(backend: str) -> None:
    run, tokens = runner(backend), random_tokens(8, seed=5)
    first, second = run.open(), run.open()
    prefill(run, first, tokens[:4])
    tree = Segment(first, [tokens[4], 7, 8, 9], [-1, 0, 0, 2])
    output = run.forward_tapped([tree, Segment(second, tokens, num_logits=2)], (2, 6))
    assert output.taps is not None
    assert output.taps.shape == (12, 2, HIDDEN)
    assert len(output.logits) == 6
    for row, path in enumerate(([], [7], [8], [8, 9])):
        for column, layer in enumerate((2, 6)):
            want = target_states(TARGET, [*tokens[:5], *path])[layer][-1]
            torch.testing.assert_close(output.taps[row, column], want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.taps[4:, 1], target_states(TARGET, tokens)[6], rtol=1e-3, atol=1e-4)
    for sequence in (first, second):
        run.close(sequence)


@pytest.mark.skipif("native" not in BACKENDS, reason="needs a C compiler")
def test_native_states_of_long_prompts_and_of_plain_forwards() -> None:
    tokens = [i % 97 for i in range(600)]
    run = NativeRunner(ToySource(long_context()), "fp32")
    sequence = run.open()
    output = run.forward_tapped([Segment(sequence, tokens, num_logits=0)], (6,))
    assert output.taps is not None
    torch.testing.assert_close(output.taps[:, 0], target_states(long_context(), tokens)[6], rtol=1e-2, atol=1e-3)
    assert run.forward([Segment(sequence, tokens[:3])]).taps is None


def long_context() -> str:
    EXTRA_CONFIGS["heads_long"] = {**CONFIGS["llama"], "head_dim": 16, "num_hidden_layers": 6, "max_position_embeddings": 1024}
    return "heads_long"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_greedy_texts_are_those_of_plain_decoding(method: str, form: str, backend: str, tmp_path: Path) -> None:
    run = runner(backend)
    params = SamplingParams(max_tokens=24)
    want = engine(run).generate(PROMPT, params).token_ids
    drafter = make(method + form, tmp_path, run)
    for k in (1, 4, 11) if backend == "lean" else (4,):  # drafting is the same code whoever hands out the states
        result = engine(run, [drafter], k).generate(PROMPT, params)
        assert result.token_ids == want
        assert result.num_drafted > 20


@pytest.mark.parametrize("spec", ["eagle", "eagle3+tree", "medusa+tree"])
def test_batches_and_samples_of_one_prompt_are_followed_one_by_one(spec: str, tmp_path: Path) -> None:
    run = runner("lean")
    drafter = make(spec, tmp_path, run)
    prompts = [PROMPT, [5], random_tokens(30, seed=6), [9, 9]]
    params = SamplingParams(max_tokens=12)
    want = [engine(run).generate(prompt, params).token_ids for prompt in prompts]
    results = engine(run, [drafter]).generate(prompts, params)
    assert [result.token_ids for result in results] == want
    assert all(result.num_drafted for result in results)
    seeded = SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=3)
    plain, drafted = (engine(run, made).generate(PROMPT, seeded) for made in ([], [drafter]))
    assert isinstance(plain, list)
    assert isinstance(drafted, list)
    assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]
    assert all(result.num_drafted for result in drafted)


def test_heads_draft_beside_each_other_and_beside_other_drafters(tmp_path: Path) -> None:
    run = runner("lean")
    drafters = [make(spec, tmp_path / spec, run) for spec in ("eagle3", "medusa", "eagle+tree")]
    drafters.append(registry.create("ngram", {}, DrafterContext(vocab_size=97, max_context=512)))
    costs = CostTable([1, 17], [1], [[1e-3, 1.1e-3]])
    mixed = Engine(run, costs=costs, controller=controllers.create("pacer", costs, {}), drafters=drafters)
    params = SamplingParams(max_tokens=60)
    assert mixed.generate(PROMPT, params).token_ids == engine(run).generate(PROMPT, params).token_ids
    plain = mixed.generate(PROMPT, params, plain=True)
    assert plain.num_drafted == 0


def pairs_law(prompt: Sequence[int]) -> np.ndarray:
    """Probability of each pair of first tokens, by enumeration over the target of transformers."""
    first = torch.softmax(stock_logits(SMALL_TARGET, prompt)[-1], 0)
    second = [torch.softmax(stock_logits(SMALL_TARGET, [*prompt, a])[-1], 0) for a in range(SMALL_VOCAB)]
    return torch.stack([first[a] * second[a] for a in range(SMALL_VOCAB)]).double().numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_sampled_pairs_follow_the_enumerated_law(method: str, form: str, tmp_path: Path) -> None:
    run, count = runner("lean", SMALL_TARGET), 128 if form else 256
    drafter = make(method + form, tmp_path, run, SMALL_TARGET)
    drafting = engine(run, [drafter], k=2 if not form else 4)
    prompt = [0, 1, 2, 3, 4]
    seen: Counter[tuple[int, ...]] = Counter()
    drafted = 0
    for _ in range(count // 32):
        results = drafting.generate(prompt, SamplingParams(max_tokens=3, temperature=1.0, n=32))
        assert isinstance(results, list)
        seen.update(result.token_ids[:2] for result in results)
        drafted += sum(result.num_drafted for result in results)
    want = pairs_law(prompt)
    got = np.array([[seen[a, b] for b in range(SMALL_VOCAB)] for a in range(SMALL_VOCAB)])
    assert got.sum() == count
    assert drafted > count
    keep = want * count > 1.0  # cells that are next to never seen are joined
    cells = [np.append(part[keep], part[~keep].sum()) for part in (got.astype(float), want * count)]
    assert chisquare(cells[0], cells[1] * cells[0].sum() / cells[1].sum()).pvalue > 1e-6


def fitted(method: str, text: Sequence[int]) -> Head:
    """A head that knows a text of at most 64 tokens by heart: its first matrix is fitted to it, and its layer adds nothing.

    EAGLE-1: (next token, state) -> next state, so it is right at every depth. EAGLE-3: states -> the output row of the token
    after the next one, so its first token is right.
    """
    head = head_of(method)
    for name, values in head.tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "fc.bias")):
            values.zero_()
    states = [state.double() for state in target_states(TARGET, text)]
    if method == "eagle":
        embedded = stock_model(TARGET).get_input_embeddings().weight.detach().double()[list(text[1:])]
        inputs, outputs = torch.cat([embedded, states[-1][:-1]], 1), states[-1][1:]
    else:
        head.tensors.pop("d2t")
        head = replace(head, settings={**head.settings, "draft_vocab_size": 97})
        head.tensors["lm_head.weight"] = torch.nn.functional.normalize(torch.randn(97, HIDDEN))
        head.tensors["norm.weight"].fill_(1.0)
        inputs = torch.cat([states[layer][:-2] for layer in (2, 3, 3)], 1)
        outputs = head.tensors["lm_head.weight"].double()[list(text[2:])]
    head.tensors["fc.weight"].copy_((torch.linalg.pinv(inputs) @ outputs).T)
    return head


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "least"), [("eagle", 4.9), ("eagle3", 1.9)])
def test_a_head_that_knows_the_text_is_always_right(method: str, least: float, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    run, params = runner("lean"), SamplingParams(max_tokens=40)
    text = engine(run).generate(PROMPT, params).token_ids
    options = {"tree_width": 1} if form else {}
    drafter = drafter_of(fitted(method, [*PROMPT, *text]), tmp_path, run, tree=bool(form), **options)
    result = engine(run, [drafter]).generate(PROMPT, params)
    assert result.token_ids == text
    whole = result.steps[:-1]  # the last round is cut at the end of the text
    assert sum(step.num_emitted for step in whole) / len(whole) >= least


# ---------- the check at the start ----------


class WordsSource(ToySource):
    @property
    def tokenizer(self) -> Tokenizer:
        return byte_level_tokenizer()


def start(name: str, folder: Path, head: Head) -> Engine:
    source = WordsSource(WORDS)
    run = runner("lean", WORDS)
    target = Target(source, run, RunnerConfig(), CostTable([1, 17], [1], [[1e-3, 1.5e-3]]))
    return build_engine(Engine, target, SpeculationConfig(draft=f"{name}:{write(head, folder)}"))


def test_a_head_that_is_hardly_ever_right_gets_a_note_and_no_error(tmp_path: Path) -> None:
    made = start("eagle", tmp_path, random_eagle(target=WORDS))
    (note,) = made.notes
    assert "eagle:" in note
    assert "% of " in note
    assert "head of this very target" in note
    result = made.generate("hello", SamplingParams(max_tokens=3))
    assert result.notes == made.notes
    assert made.costs.drafters[made.drafters[0].name].per_token > 0


def test_a_head_that_is_right_gets_no_note(tmp_path: Path) -> None:
    assert start("medusa", tmp_path, fitted_head()).notes == ()


def fitted_head() -> Head:
    """A Medusa head that knows the check's text: its matrix is fitted to the states of it, as many as they have dimensions."""
    prompt = WordsSource(WORDS).tokenizer.encode("Write a short letter to a friend about a walk along the sea.")
    text = [*prompt, *engine(runner("lean", WORDS)).generate(prompt, SamplingParams(max_tokens=HIDDEN)).token_ids]
    first = len(prompt) - 2  # the state before the pending token, which is the prompt's last one
    states = target_states(WORDS, text)[-1][first : len(text) - 2]
    following = torch.nn.functional.one_hot(torch.tensor(text[first + 2 :]), 275).float()
    head = random_medusa(heads=1, target=WORDS)
    head.tensors["0.0.linear.weight"].zero_()
    head.tensors["0.0.linear.bias"].zero_()
    head.tensors["0.1.weight"].copy_((torch.linalg.pinv(states) @ following).T)
    return head
