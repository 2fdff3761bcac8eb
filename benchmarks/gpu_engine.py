"""The engine on a GPU: memory that runs out, batches, and targets of other sizes, all of them SmolLM2 at a larger model's cost.

    python benchmarks/gpu_engine.py --model MODEL.gguf --prompts PROMPTS.jsonl --output benchmarks/results/gpu_engine.json

The draft is the small model itself, in bf16; of batches also what drafts by default. Speeds are those of decoding, without the
prompt, second pass of two.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_document import begin, default_drafter

from paceline.config import RunnerConfig, SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting.model import ModelDrafter
from paceline.engine import Engine
from paceline.errors import ResourceError
from paceline.execution.cuda.runner import CudaRunner
from paceline.records import GenerationResult
from paceline.study.prompts import encode_prompt, load_prompts

MIB = 1 << 20
SPARE_MIB = (2048, 512, 384, 256)
"""Free memory when a request begins: enough, and ever less."""
BATCHES = (1, 4, 16)
TEMPERATURES = (0.0, 0.7, 1.0)


def open_engine(shape: str, model: str, memory_gb: float | None = None) -> Engine:
    options = RunnerConfig(max_context=2048, memory_gb=memory_gb)
    return Engine.from_pretrained(f"upscaled:{shape}:{model}", device="cuda", draft=f"model:{model}", runner=options)


def close(engine: Engine) -> None:
    engine.close()
    gc.collect()
    torch.cuda.empty_cache()


def encoded(engine: Engine, prompts: Sequence[str]) -> list[list[int]]:
    return [encode_prompt(engine.tokenizer, text)[:1500] for text in prompts]


def tokens_of(results: Sequence[GenerationResult]) -> list[tuple[int, ...]]:
    return [tuple(r.token_ids) for r in results]


def decoded(engine: Engine, prompts: list[list[int]], params: SamplingParams, plain: bool) -> tuple[float, list[tuple[int, ...]]]:
    """Tokens a second of all sequences together, decoded side by side, and their tokens."""
    results: list[GenerationResult] = []
    for _ in range(2):
        for drafter in engine.drafters:
            drafter.forget()  # nothing is drafted from an answer to the same prompt
        results = engine.generate(prompts, params, plain=plain)
    return sum(r.num_tokens for r in results) / max(r.decode_seconds for r in results), tokens_of(results)


def with_default(engine: Engine) -> Engine:
    """The same target with what drafts by default."""
    costs = CostTable.from_json(engine.costs.to_json())
    return Engine(
        engine.runner,
        costs=costs,
        controller=controllers.create("pacer", costs),
        drafters=[default_drafter(engine.runner, engine.tokenizer, costs)],
        tokenizer=engine.tokenizer,
        source=engine.source,
    )


def batches(engine: Engine, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Plain and speculative speed of several sequences at once, and whether the texts are those of each alone."""
    found: dict[str, Any] = {}
    default = with_default(engine)
    for temperature in TEMPERATURES:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=1)
        alone = [tokens_of([one])[0] for one in (engine.generate(ids, params, plain=True) for ids in prompts)]
        for size in BATCHES:
            plain, plain_texts = decoded(engine, prompts[:size], params, plain=True)
            drafted, drafted_texts = decoded(engine, prompts[:size], params, plain=False)
            looked_up, default_texts = decoded(default, prompts[:size], params, plain=False)
            entry = {
                "plain_tokens_per_s": round(plain, 1),
                "drafted_tokens_per_s": round(drafted, 1),
                "over_plain": round(drafted / plain, 3),
                "default_tokens_per_s": round(looked_up, 1),
                "default_over_plain": round(looked_up / plain, 3),
                "same_texts": plain_texts == drafted_texts == default_texts == alone[:size],
            }
            found[f"temperature {temperature}, {size} sequences"] = entry
            print(temperature, size, entry, flush=True)
    return found


def short_memory(engine: Engine, prompt: list[int], max_tokens: int) -> list[dict[str, Any]]:
    """What becomes of a request with a long prompt when others fill the memory, and afterwards."""
    drafter = engine.drafters[0]
    assert isinstance(drafter, ModelDrafter)
    draft = drafter.runner
    assert isinstance(draft, CudaRunner)
    params = SamplingParams(max_tokens=max_tokens)
    found, want = [], tokens_of([engine.generate(prompt, params)])
    for spare in (*SPARE_MIB, None):
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        filler = torch.empty(0 if spare is None else free - spare * MIB, dtype=torch.uint8, device="cuda")
        entry: dict[str, Any] = {"free_mib": spare}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = engine.generate(prompt, params)
                assert isinstance(result, GenerationResult)
                entry |= {"same_text": tokens_of([result]) == want, "drafted": sum(s.num_drafted for s in result.steps)}
            except ResourceError as error:
                entry["error"] = str(error)
        entry |= {"draft_offloaded": draft.is_offloaded, "warnings": sorted({str(w.message) for w in caught})}
        found.append(entry)
        print(entry, flush=True)
        del filler
    return found


def refused(shape: str, model: str, memory_gb: float) -> str:
    """The message of a budget that is too small."""
    try:
        close(open_engine(shape, model, memory_gb))
    except ResourceError as error:
        return str(error)
    return "not refused"


def one_by_one(engine: Engine, prompts: Sequence[list[int]], max_tokens: int) -> dict[str, Any]:
    """Plain and speculative speed, prompt by prompt."""
    params, found = SamplingParams(max_tokens=max_tokens), {}
    texts = {}
    for name, plain in (("plain", True), ("drafted", False)):
        results: list[GenerationResult] = []
        for _ in range(2):
            results = [r for r in (engine.generate(ids, params, plain=plain) for ids in prompts) if isinstance(r, GenerationResult)]
        found[f"{name}_tokens_per_s"] = round(sum(r.num_tokens for r in results) / sum(r.decode_seconds for r in results), 1)
        texts[name] = tokens_of(results)
    found["over_plain"] = round(found["drafted_tokens_per_s"] / found["plain_tokens_per_s"], 3)
    return {**found, "same_texts": texts["plain"] == texts["drafted"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="default", help="a GGUF file or folder")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--limit", type=int, default=2, help="prompts of a category")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--shapes", nargs="*", default=["1b", "30b"])
    arguments = parser.parse_args()
    document, save = begin(arguments.output)
    texts = [p.text for p in load_prompts(arguments.prompts, limit=arguments.limit)]
    document["refused"] = refused("8b", arguments.model, 12)
    started = time.perf_counter()
    engine = open_engine("8b", arguments.model)
    document["from_pretrained_8b_s"] = round(time.perf_counter() - started, 1)
    prompts = encoded(engine, texts)
    long = [token for ids in sorted(prompts, key=len) for token in ids][:1500]
    document["memory"] = short_memory(engine, long, 64)
    save()
    document["batch"] = batches(engine, prompts[: max(BATCHES)], arguments.max_tokens)
    save()
    close(engine)
    del engine
    document["shapes"] = {}
    for shape in arguments.shapes:
        started = time.perf_counter()
        engine = open_engine(shape, arguments.model)
        entry = {"from_pretrained_s": round(time.perf_counter() - started, 1), "weight_gb": engine.runner.info.weight_bytes / 1e9}
        document["shapes"][shape] = {**entry, **one_by_one(engine, prompts[:6], arguments.max_tokens)}
        print(shape, document["shapes"][shape], flush=True)
        close(engine)
        del engine
        save()
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
