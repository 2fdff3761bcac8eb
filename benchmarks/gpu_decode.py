"""GPU decoding at large-model cost: ceilings, plain steps, the price of verification, formats, host gap, and real text.

    python benchmarks/gpu_decode.py --output benchmarks/results/gpu_kernels.json
    python benchmarks/gpu_decode.py --only text --model MODEL.gguf --prompts PROMPTS.jsonl --output benchmarks/results/gpu_text.json

Without a model the weights are random, in the shape of an 8-billion-parameter Llama (hidden 4608, 32 layers, 36 and 12 heads of 64,
intermediate 14336). Times are medians of repeats of captured forwards between device events; ratios come from the same run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable, DraftCost
from paceline.drafting.base import Drafter
from paceline.drafting.model import ModelDrafter
from paceline.drafting.ngram import NgramDrafter
from paceline.engine import Engine
from paceline.execution.base import Segment, prefill
from paceline.execution.cuda.linears import PackedLinear, Tuning
from paceline.execution.cuda.runner import CudaRunner
from paceline.execution.measure import measure_costs
from paceline.models.base import ModelSource, Tokenizer
from paceline.models.lazy import EMBEDDING, LazyTensors
from paceline.models.resolve import open_model
from paceline.records import GenerationResult
from paceline.study.environment import command, environment
from paceline.study.prompts import load_prompts
from paceline.study.upscale import SHAPES, UpscaledSource

SHAPE_8B = {
    "model_type": "llama",
    "hidden_size": 4608,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 36,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
}
SHAPE_SMALL = {**SHAPE_8B, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30} | {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
FEW_ROWS = (1, 8, 16, 32)
MATRICES = {"qkv": (3840, 4608), "o": (4608, 2304), "gate_up": (28672, 4608), "down": (4608, 14336), "head": (49152, 4608)}
GIB = 1 << 30


class RandomSource(ModelSource):
    """Random weights in a shape; each tensor is made on the device when asked for, always the same one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.name = self.fingerprint = "random weights"

    @property
    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError("random weights have no tokenizer")

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return _RandomTensors(self.config)

    def hf_model(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        raise NotImplementedError("random weights run on our kernels only")


class _RandomTensors(Mapping[str, torch.Tensor]):
    def __init__(self, config: Mapping[str, Any]) -> None:
        hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
        vocab = (config["vocab_size"], hidden)
        self._shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": vocab,
            "model.norm.weight": (hidden,),
            "lm_head.weight": vocab,
        }
        parts: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        for layer in range(config["num_hidden_layers"]):
            self._shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        generator = torch.Generator("cuda").manual_seed(zlib.crc32(name.encode()))
        if len(shape) == 1:
            return torch.rand(shape, generator=generator, device="cuda") + 0.5
        weight = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        return weight.normal_(0, 0.7 / shape[1] ** 0.5, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def milliseconds(run: Callable[[], object], inner: int = 10, repeats: int = 7) -> list[float]:
    """Device milliseconds of one run, a figure for each repeat of `inner` runs."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(times), 5), "min": round(min(times), 5), "max": round(max(times), 5)}


def ceilings() -> dict[str, float]:
    """TB/s of a device copy (read and written bytes) and of a read."""
    a = torch.empty(4 * GIB, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    copied = statistics.median(milliseconds(lambda: b.copy_(a), inner=3))
    read = statistics.median(milliseconds(lambda: a.view(torch.int64).sum(), inner=3))
    return {"copy_tb_s": 2 * a.numel() / copied / 1e9, "read_tb_s": a.numel() / read / 1e9}


def replays(run: Callable[[], object]) -> Callable[[], None]:
    """A captured function."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def linears(rows: Sequence[int]) -> dict[str, Any]:
    """Microseconds of each product of the 8B shape: ours in each format, and the library's in bf16."""
    table = {}
    for name, (outputs, inputs) in MATRICES.items():
        copies = max(2, int(1e9 / (outputs * inputs * 2)))  # more than the second-level cache holds
        weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
        table[name] = {"library bf16": {count: library_us(weights, count) for count in rows}}
        for kind in ("bf16", "int8", "fp8", "int4"):
            packed = [PackedLinear(w, kind) for w in weights]
            table[name][kind] = {count: ours_us(packed, count) for count in (rows if kind != "fp8" else rows[:1])}
    return table


def library_us(weights: Sequence[torch.Tensor], rows: int) -> float:
    x = torch.randn(rows, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
    run = replays(lambda: [F.linear(x, weight) for weight in weights])
    return round(1e3 * statistics.median(milliseconds(run, 4, 5)) / len(weights), 2)


def ours_us(packed: Sequence[PackedLinear], rows: int) -> float:
    x = torch.randn(64, packed[0].packed.inputs, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(64, packed[0].packed.padded_rows, device="cuda")

    def run() -> None:
        for linear in packed:
            linear.launch("logits", rows, x, out, out_stride=out.shape[1])

    return round(1e3 * statistics.median(milliseconds(replays(run), 4, 5)) / len(packed), 2)


def pretend(runner: CudaRunner, sequence: Any, length: int) -> None:
    """Commit tokens without computing them: timing needs their number only."""
    while sequence.length < length:
        count = min(2048, length - sequence.length)
        with torch.inference_mode():
            runner._cache.stage(sequence, count)
            runner._cache.accept(sequence, range(count))


def steps(runner: CudaRunner, contexts: Sequence[int], rows: Sequence[int], copy_tb_s: float) -> dict[str, Any]:
    """Milliseconds of forwards over `rows` tokens, and what the host adds to a plain step."""
    sequence, found = runner.open(), {}
    spec = runner._spec
    for context in contexts:
        pretend(runner, sequence, context)
        table = {}
        for count in rows:
            segment = [Segment(sequence, [(7919 * i + 13) % spec.vocab for i in range(count)])]
            runner.forward(segment)
            table[count] = spread(milliseconds(runner.capture(segment)))
        one = table[1]["median"]
        moved = runner.info.weight_bytes + 4 * spec.layers * spec.kv_heads * spec.head_dim * context
        found[str(context)] = {
            "ms": table,
            "over_one_row": {count: round(t["median"] / one, 4) for count, t in table.items()},
            "plain_tokens_per_s": round(1e3 / one, 2),
            "gb_per_s": round(moved / one / 1e6, 1),
            "share_of_copy": round(moved / one / 1e9 / copy_tb_s, 4),
            "host": host_gap(runner, sequence, context, one),
        }
    runner.close(sequence)
    return found


def host_gap(runner: CudaRunner, sequence: Any, context: int, graph_ms: float, count: int = 32) -> dict[str, float]:
    """Wall-clock milliseconds of a plain step with one wait a token, and in bursts without waits."""
    times = []
    for _ in range(5):
        runner.truncate(sequence, context)
        torch.cuda.synchronize()
        start, token = time.perf_counter(), 5
        for _ in range(count):
            token = (runner.forward([Segment(sequence, [token])]).best or [0])[0]
            runner.accept(sequence, [0])
        times.append(1e3 * (time.perf_counter() - start) / count)
    bursts = []
    for _ in range(5):
        runner.truncate(sequence, context)
        torch.cuda.synchronize()
        start = time.perf_counter()
        runner.decode_ahead(sequence, [5], count, lambda _: True)
        bursts.append(1e3 * (time.perf_counter() - start) / count)
    runner.truncate(sequence, context)
    step, burst = statistics.median(times), statistics.median(bursts)
    return {
        "step_ms": round(step, 4),
        "step_gap": round(step / graph_ms - 1, 4),
        "burst_step_ms": round(burst, 4),
        "burst_gap": round(burst / graph_ms - 1, 4),
    }


def same_bits(runner: CudaRunner) -> bool:
    """Whether rows of a tree, of a chain, one by one and in a batch have the same bits at several lengths."""
    vocab, equal = runner.info.vocab_size, True
    for length in (5, 700, 1500):
        ids = [(7919 * i + 13) % vocab for i in range(length + 10)]
        sequence = runner.open()
        runner.forward([Segment(sequence, ids[:length], num_logits=0)])
        runner.accept(sequence, range(length))
        tokens, parents, path = ids[length:], [-1, 0, 0, 1, 1, 2, 3, 6, 7, 4], [0, 1, 3, 6, 7, 8]
        tree = runner.forward([Segment(sequence, tokens, parents)]).logits.clone()
        chain = runner.forward([Segment(sequence, [tokens[i] for i in path])]).logits.clone()
        equal &= torch.equal(chain, tree[path])
        twin = runner.fork(sequence)
        batch = runner.forward([Segment(twin, tokens[:1]), Segment(sequence, tokens, parents)]).logits
        equal &= torch.equal(batch[1:], tree) and torch.equal(batch[0], tree[0])
        for row, node in enumerate(path):
            equal &= torch.equal(runner.forward([Segment(twin, [tokens[node]])]).logits[0], chain[row])
            runner.accept(twin, [0])
        runner.close(twin)
        runner.close(sequence)
    return bool(equal)


def kernels(contexts: Sequence[int]) -> dict[str, Any]:
    """The 8B shape in each format, and the small shape in bf16, with random weights."""
    result: dict[str, Any] = {"ceilings": (found := ceilings()), "shape": SHAPE_8B}
    for precision in ("bf16", "int8", "fp8", "int4"):
        start = time.perf_counter()
        runner = CudaRunner(RandomSource(SHAPE_8B), precision, memory_bytes=48 * GIB)
        torch.cuda.synchronize()
        entry: dict[str, Any] = {"load_s": round(time.perf_counter() - start, 2), "weight_bytes": runner.info.weight_bytes}
        entry["same_bits"] = same_bits(runner)
        entry["contexts"] = steps(runner, contexts, ROWS if precision == "bf16" else FEW_ROWS, found["copy_tb_s"])
        result[precision] = entry
        runner.shutdown()
        torch.cuda.empty_cache()
    plain = {c: result["bf16"]["contexts"][c]["ms"][1]["median"] for c in result["bf16"]["contexts"]}
    result["speedup_over_bf16"] = {
        p: {c: round(plain[c] / result[p]["contexts"][c]["ms"][1]["median"], 3) for c in plain} for p in ("int8", "fp8", "int4")
    }
    small = CudaRunner(RandomSource(SHAPE_SMALL), "bf16", memory_bytes=8 * GIB)
    result["small"] = {"shape": SHAPE_SMALL, "contexts": steps(small, (512,), ROWS, found["copy_tb_s"])}
    no_overlap = CudaRunner(RandomSource(SHAPE_8B), "bf16", memory_bytes=48 * GIB, tuning=Tuning(overlap=False))
    result["bf16_without_overlap"] = steps(no_overlap, contexts[:1], (1, 8), found["copy_tb_s"])
    return result


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
        "model:int4": [models["model:int4"]],
        "model:bf16": [models["model:bf16"]],
        "ngram,model:bf16": [NgramDrafter(), models["model:bf16"]],
        "hopeless": [models["hopeless"]],
    }
    engines = {name: engine_of(runner, target, source.tokenizer, costs, made) for name, made in methods.items()}
    prompts = [
        source.tokenizer.encode(source.tokenizer.render_chat([{"role": "user", "content": p.text}]), add_special=False)
        for p in load_prompts(arguments.prompts, limit=arguments.limit)
    ]
    prompts = [ids for ids in prompts if len(ids) < 1500]
    result |= {"prompts": len(prompts), "max_tokens": arguments.max_tokens, "costs": costs.to_json()}
    params = SamplingParams(max_tokens=arguments.max_tokens)
    result["greedy"] = compare(engines, prompts, params, costs)
    save()
    if arguments.peers:
        result["transformers"] = peers(target, source, prompts[: arguments.peers], min(64, arguments.max_tokens))
        save()
    sampled = {name: engine_of(runner, target, source.tokenizer, costs, methods[name]) for name in ("plain", "model:bf16")}
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
    """All methods on every prompt in turn; the first pass captures graphs and teaches the controllers, the second one counts."""
    results: dict[str, list[GenerationResult]] = {}
    for _ in range(2):
        results = {name: [] for name in engines}
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
        runner.decode_ahead(sequence, [5], tokens, lambda _: True)
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
        "same_text_as_plain": all(a.token_ids == b.token_ids for a, b in zip(results, plain, strict=True)),
        "share_of_predicted": round((verifying + drafting) / sum(s.round_seconds for s in later), 4),
        "predicted_over_verify_time": round(verifying / sum(s.verify_seconds for s in later), 4),
        "predicted_over_draft_time": round(drafting / sum(s.draft_seconds for s in later), 4) if drafting else None,
        "tokens_per_round": round(tokens / max(1, len(rounds)), 3),
        "acceptance": round(sum(s.num_accepted for s in rounds) / drafted, 4) if drafted else None,
        "first_round_ms": round(1e3 * statistics.median(r.steps[0].round_seconds for r in results), 2),
        "host_share": round(1 - sum(s.verify_seconds + s.draft_seconds for s in rounds) / seconds, 4),
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


def shown_command() -> str:
    """The command line, with files by their names alone."""
    return shlex.join(Path(word).name if "/" in word else word for word in shlex.split(command()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=("kernels", "linears", "text"), action="append")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--model", default="default", help="of the text part: default, or a GGUF file or folder")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--limit", type=int, default=2, help="prompts of a category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--peers", type=int, default=3, help="prompts for transformers; 0 leaves it out")
    arguments = parser.parse_args()
    parts = arguments.only or ["kernels", "linears"]
    document: dict[str, Any] = {"command": shown_command(), "gpu": torch.cuda.get_device_name(), **environment()}

    def save() -> None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")

    with torch.inference_mode():
        if "kernels" in parts:
            document["kernels"] = kernels(arguments.contexts)
            save()
        if "linears" in parts:
            document["linears_us"] = linears((1, 8, 32))
    if "text" in parts:
        document["text"] = {}
        text(arguments, document["text"], save)
    save()
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
