"""GPU decoding of real text: a small model at a larger one's cost, our methods and transformers' on the same prompts.

python benchmarks/gpu_text.py --model MODEL.gguf --prompts PROMPTS.jsonl --output benchmarks/results/gpu_text.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_document import GIB, begin, default_drafter

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable, DraftCost
from paceline.drafting.base import Drafter
from paceline.drafting.model import ModelDrafter
from paceline.drafting.ngram import NgramDrafter
from paceline.engine import Engine
from paceline.execution.base import Decoding, prefill
from paceline.execution.cuda.runner import CudaRunner
from paceline.execution.measure import measure_costs
from paceline.models.base import ModelSource, Tokenizer
from paceline.models.lazy import EMBEDDING, LazyTensors
from paceline.models.resolve import open_model
from paceline.records import GenerationResult
from paceline.study.prompts import encode_prompts, load_prompts
from paceline.study.upscale import SHAPES, UpscaledSource


class Shuffled(ModelSource):
    """A hopeless draft: the model with its embedding's rows moved by one."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.config, self.name, self.fingerprint = source.config, f"{source.name}, shuffled", f"{source.fingerprint} shuffled"

    @property
    def tokenizer(self) -> Tokenizer:
        return self._source.tokenizer

    def tensors(self) -> Mapping[str, torch.Tensor]:
        tensors = self._source.tensors()
        return LazyTensors(list(tensors), lambda name: tensors[name].roll(1, 0) if name == EMBEDDING else tensors[name])

    def hf_model(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        raise NotImplementedError("the hopeless draft runs on our kernels only")


def text(arguments: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]) -> None:
    """A small model at a larger one's cost, on real prompts: our methods prompt by prompt in turn, transformers' on the pair."""
    source = open_model(arguments.model)
    target = UpscaledSource(source, SHAPES[arguments.shape], device="cuda")
    started = time.perf_counter()
    runner = CudaRunner(target, arguments.precision, max_context=2048, memory_bytes=60 * GIB)
    result |= {"target": target.name.rpartition("/")[2], "load_s": round(time.perf_counter() - started, 2)}
    drafts = {p: CudaRunner(source, p, max_context=2048, memory_bytes=8 * GIB) for p in ("bf16", "int4")}
    hopeless = CudaRunner(Shuffled(source), "int4", max_context=2048, memory_bytes=8 * GIB)
    costs = measure_costs(runner, budget_seconds=4)
    models = {f"model:{p}": ModelDrafter(r, f"model:{p}") for p, r in drafts.items()} | {
        "hopeless": ModelDrafter(hopeless, "hopeless")
    }
    costs.drafters |= {name: draft_cost(drafter.runner) for name, drafter in models.items()}
    methods: dict[str, list[Drafter]] = {
        "plain": [],
        "ngram": [NgramDrafter()],
        "default": [default_drafter(runner, source.tokenizer, costs)],
        "model:int4": [models["model:int4"]],
        "model:bf16": [models["model:bf16"]],
        "ngram,model:bf16": [NgramDrafter(), models["model:bf16"]],
        "default,model:bf16": [default_drafter(runner, source.tokenizer, costs), models["model:bf16"]],
        "hopeless": [models["hopeless"]],
    }
    engines = {name: engine_of(runner, target, source.tokenizer, costs, made) for name, made in methods.items()}
    chosen = load_prompts(arguments.prompts, limit=arguments.limit)
    prompts = [ids for _, ids in encode_prompts(source.tokenizer, chosen, longest=1499)]
    result |= {"prompts": len(prompts), "max_tokens": arguments.max_tokens, "costs": costs.to_json()}
    params = SamplingParams(max_tokens=arguments.max_tokens)
    result["greedy"] = compare(engines, prompts, params, costs)
    save()
    if arguments.peers:
        result["transformers"] = peers(target, source, prompts[: arguments.peers], min(64, arguments.max_tokens))
        save()
    sampled = {
        name: engine_of(runner, target, source.tokenizer, costs, methods[name]) for name in ("plain", "default", "model:bf16")
    }
    few = prompts[: max(1, len(prompts) // 4)]
    result["sampled"] = compare(sampled, few, SamplingParams(max_tokens=arguments.max_tokens, temperature=0.7, seed=1), costs)


def engine_of(
    runner: CudaRunner, source: ModelSource, tokenizer: Tokenizer, costs: CostTable, drafters: Sequence[Drafter]
) -> Engine:
    """An engine with the default controller and a cost table of its own."""
    table = CostTable.from_json(costs.to_json())
    controller = controllers.create("pacer", table)
    return Engine(runner, costs=table, controller=controller, drafters=drafters, tokenizer=tokenizer, source=source)


def compare(
    engines: Mapping[str, Engine], prompts: Sequence[list[int]], params: SamplingParams, costs: CostTable
) -> dict[str, Any]:
    """All methods on every prompt in turn; the first pass captures graphs and teaches the controllers, the second one counts.

    default: what drafts where no drafter is named.
    """
    results: dict[str, list[GenerationResult]] = {}
    for _ in range(2):
        results = {name: [] for name in engines}
        for drafter in {id(drafter): drafter for engine in engines.values() for drafter in engine.drafters}.values():
            drafter.forget()  # nothing is drafted from an answer to the same prompt
        for ids in prompts:
            for name, engine in engines.items():
                results[name].append(engine.generate(ids, params))
    found = {name: summary(made, results["plain"], costs) for name, made in results.items()}
    for name, figures in found.items():
        print(name, figures, flush=True)
    return found


def draft_cost(runner: CudaRunner, tokens: int = 8, fed: int = 256) -> DraftCost:
    """Seconds of a drafted token, in drafts of some tokens that the host reads along, and of one to catch up with."""
    sequence = runner.open()
    drafting, feeding = [], []
    for _ in range(10):
        runner.truncate(sequence, 0)
        torch.cuda.synchronize()
        start = time.perf_counter()
        prefill(runner, sequence, [5] * fed)
        torch.cuda.synchronize()
        feeding.append((time.perf_counter() - start) / fed)
        start = time.perf_counter()
        runner.decode_ahead([Decoding(sequence, [5], tokens, lambda _: True)])[0].settled()
        drafting.append((time.perf_counter() - start) / tokens)
    runner.close(sequence)
    return DraftCost(per_token=statistics.median(drafting), per_catch_up=statistics.median(feeding))


def summary(results: Sequence[GenerationResult], plain: Sequence[GenerationResult], costs: CostTable) -> dict[str, Any]:
    """Speed, agreement with plain decoding, and the speed that costs and acceptances predict.

    share_of_predicted: predicted over real time of all rounds but a request's first, in which a draft reads the prompt.
    """
    tokens, seconds = sum(r.num_tokens for r in results), sum(r.decode_seconds for r in results)
    base = sum(r.num_tokens for r in plain) / sum(r.decode_seconds for r in plain)
    rounds = [s for r in results for s in r.steps]
    later = [s for s in rounds if not s.warmup]
    drafted = sum(s.num_drafted for s in rounds)
    verifying = sum(costs.t_verify(s.num_drafted + 1, s.context_length) for s in later)
    drafting = sum(costs.t_draft(s.drafter or "", s.num_drafted) for s in later)
    return {
        "tokens_per_s": round(tokens / seconds, 2),
        "over_plain": round(tokens / seconds / base, 4),
        "worst_prompt_over_plain": round(min(p.decode_seconds / r.decode_seconds for r, p in zip(results, plain, strict=True)), 4),
        "worst_prompt": worst_prompt(results, plain),
        "same_text_as_plain": all(a.token_ids == b.token_ids for a, b in zip(results, plain, strict=True)),
        "share_of_predicted": round((verifying + drafting) / sum(s.round_seconds for s in later), 4),
        "predicted_over_verify_time": round(verifying / sum(s.verify_seconds for s in later), 4),
        "predicted_over_draft_time": round(drafting / sum(s.draft_seconds for s in later), 4) if drafting else None,
        "tokens_per_round": round(tokens / max(1, len(rounds)), 3),
        "acceptance": round(sum(s.num_accepted for s in rounds) / drafted, 4) if drafted else None,
        "first_round_ms": round(1e3 * statistics.median(r.steps[0].round_seconds for r in results), 2),
        "host_share": round(1 - sum(s.verify_seconds + s.draft_seconds for s in rounds) / seconds, 4),
    }


def worst_prompt(results: Sequence[GenerationResult], plain: Sequence[GenerationResult]) -> dict[str, Any]:
    """What the prompt with the worst ratio to plain decoding took: drafting, and the rest of its rounds over those of plain."""
    number = min(range(len(plain)), key=lambda i: plain[i].decode_seconds / results[i].decode_seconds)
    one, other = results[number], plain[number]
    drafting = sum(s.draft_seconds for s in one.steps)
    return {
        "number": number,
        "prompt_tokens": one.num_prompt_tokens,
        "tokens": one.num_tokens,
        "rounds_with_a_draft": sum(s.num_drafted > 0 for s in one.steps),
        "drafted": one.num_drafted,
        "accepted": one.num_accepted,
        "drafting_ms": round(1e3 * drafting, 2),
        "first_draft_ms": round(1e3 * one.steps[0].draft_seconds, 2),
        "controller_ms": round(1e3 * sum(s.control_seconds for s in one.steps), 2),
        "over_plain_ms": round(1e3 * (one.decode_seconds - other.decode_seconds), 2),
        "longest_round_ms": round(1e3 * max(s.round_seconds for s in one.steps), 2),
        "longest_plain_round_ms": round(1e3 * max(s.round_seconds for s in other.steps), 2),
    }


def peers(target: UpscaledSource, draft: ModelSource, prompts: Sequence[list[int]], max_tokens: int) -> dict[str, Any]:
    """transformers on the same pair, greedy: plain, prompt lookup, assisted generation. Tokens a second, prompt included."""
    model, assistant = target.hf_model(torch.bfloat16, "cuda"), draft.hf_model(torch.bfloat16, "cuda")
    prompts = sorted(prompts, key=len, reverse=True)  # a static cache that was once large enough stays
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "plain, static cache, compiled": {"cache_implementation": "static"},
        "prompt lookup": {"prompt_lookup_num_tokens": 10},
        "assisted": {"assistant_model": assistant},
    }
    found = {}
    for name, more in options.items():
        times, count = 0.0, 0
        for number, prompt in enumerate([prompts[0], *prompts]):  # the first one warms up
            ids = torch.tensor([prompt], device="cuda")
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, **more)
            torch.cuda.synchronize()
            if number:
                times, count = times + time.perf_counter() - start, count + out.shape[1] - ids.shape[1]
        found[name] = round(count / times, 2)
        print("transformers", name, found[name], flush=True)
    return {"tokens_per_s": found, "prompts": len(prompts), "max_tokens": max_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="default", help="default, or a GGUF file or folder")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--limit", type=int, default=2, help="prompts of a category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--peers", type=int, default=3, help="prompts for transformers; 0 leaves it out")
    arguments = parser.parse_args()
    document, save = begin(arguments.output)
    document["text"] = {}
    text(arguments, document["text"], save)
    save()
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
