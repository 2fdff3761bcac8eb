"""Whatever drafts, the target's text comes out: token by token when greedy, in distribution when sampled."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from paceline.config import SamplingParams
from paceline.drafting.base import Drafter, DrafterContext
from paceline.drafting.corpus import write_corpus
from paceline.drafting.registry import TABLE, create, names
from toys import Language, ToyRunner, make_view, noisy_language, random_language, speculate_toy

VOCAB = 5
# Parts of a target are tested beside their code, on a model that has layers.
PARTS_OF_A_TARGET = {"early_exit", "layer_skip", "swift", "sparse_kv", "dynamic_precision"}
HEADS = {f"{kind}{form}" for kind in ("medusa", "eagle", "eagle3") for form in ("", "+tree")}  # likewise, in test_heads_engine
OTHER_TOKENIZERS = {"uag", "slem", "tli"}  # likewise, in test_cross_drafters
ALL = [name for name in sorted(names()) if name not in PARTS_OF_A_TARGET | HEADS | OTHER_TOKENIZERS]
RULES = [(name, "auto") for name in ALL] + [(name, "match") for name in ALL if TABLE[name.removesuffix("+tree")].samples]


def make(name: str, target: Language, folder: Path, vocab: int = VOCAB) -> Drafter:
    """A drafter that knows something of the target's language, made as the engine makes it."""
    if name.startswith("rest"):
        write_corpus([np.random.default_rng(0).integers(0, vocab, 400).tolist()], folder / "corpus")
        name = name.replace("rest", f"rest:{folder / 'corpus'}")
    name = name.replace("cascade", "cascade:ngram>model:near")
    if name.startswith("model"):
        name = name.replace("model", "model:near")
    name = name.replace("merged", "merged:ngram|suffix|token_recycling")
    context = DrafterContext(
        vocab_size=vocab,
        max_context=512,
        open_model=lambda _: ToyRunner(noisy_language(target, 0.7), vocab),
        open_self=lambda _: ToyRunner(noisy_language(target, 0.3), vocab),
    )
    return create(name, {}, context)


@pytest.mark.parametrize("name", ALL)
def test_greedy_text_equals_plain_decoding(name: str, tmp_path: Path) -> None:
    target = random_language(VOCAB, order=3, seed=1)
    drafter = make(name, target, tmp_path)
    for request in range(2):
        prompt = np.random.default_rng(request).integers(0, VOCAB, 12).tolist()
        plain = list(prompt)
        for _ in range(50):
            plain.append(int(np.argmax(target(tuple(plain)))))
        for num_draft in (1, 3, 16):
            view = make_view(prompt)
            runner = ToyRunner(target, VOCAB)
            assert speculate_toy(runner, drafter, view, 50, num_draft) == plain[12:]
    assert runner.forwards < 51  # something was accepted


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_sampled_text_follows_the_targets_distribution(name: str, rule: str, tmp_path: Path) -> None:
    vocab, num_tokens, samples = 3, 3, 400
    target = random_language(vocab, order=2, seed=7, scale=1.0)
    sampling = SamplingParams(temperature=0.9)
    drafter = make(name, target, tmp_path, vocab)
    prompt = [0, 1, 2, 0, 1, 2, 0, 1]
    exact = {}
    for tail in product(range(vocab), repeat=num_tokens):
        prob, text = 1.0, list(prompt)
        for token in tail:
            weights = np.exp(target(tuple(text)) / 0.9)
            prob *= weights[token] / weights.sum()
            text.append(token)
        exact[tail] = prob
    counts: Counter[tuple[int, ...]] = Counter()
    runner = ToyRunner(target, vocab)
    for seed in range(samples):
        view = make_view(prompt, sampling=sampling, seed=seed)
        counts[tuple(speculate_toy(runner, drafter, view, num_tokens, 3, rule))] += 1
    observed = [counts[tail] for tail in exact]
    assert scipy.stats.chisquare(observed, [samples * p for p in exact.values()]).pvalue > 1e-6


@pytest.mark.parametrize("name", ALL)
def test_seeded_text_does_not_depend_on_the_draft(name: str, tmp_path: Path) -> None:
    target = random_language(VOCAB, order=2, seed=3, scale=1.5)
    drafter = make(name, target, tmp_path)
    sampling = SamplingParams(temperature=1.0, seed=5)
    prompt = [0, 1, 2, 3, 0, 1]
    texts = set()
    for num_draft in (0, 1, 4, 9):
        view = make_view(prompt, sampling=sampling, seed=5, coupled=True)
        texts.add(tuple(speculate_toy(ToyRunner(target, VOCAB), drafter, view, 40, num_draft)))
    assert len(texts) == 1
