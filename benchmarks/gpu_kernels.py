"""GPU forwards at large-model cost: ceilings, plain steps, the price of verification, formats, host gap, and single products.

    python benchmarks/gpu_kernels.py --output benchmarks/results/gpu_kernels.json

The weights are random, in the shape of an 8-billion-parameter Llama (hidden 4608, 32 layers, 36 and 12 heads of 64, intermediate
14336). Times are medians of repeats of captured forwards between device events; ratios come from the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_document import GIB, begin

from paceline.execution.base import Decoding, Segment
from paceline.execution.cuda.linears import PackedLinear, Tuning
from paceline.execution.cuda.runner import CudaRunner
from paceline.models.base import ModelSource, Tokenizer

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
            again = runner.capture(segment)
            runner.forward(segment)
            table[count] = spread(milliseconds(again))
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
        runner.decode_ahead([Decoding(sequence, [5], count, lambda _: True)])[0].settled()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=("kernels", "linears"), action="append")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 8192])
    arguments = parser.parse_args()
    parts = arguments.only or ["kernels", "linears"]
    document, save = begin(arguments.output)
    with torch.inference_mode():
        if "kernels" in parts:
            document["kernels"] = kernels(arguments.contexts)
            save()
        if "linears" in parts:
            document["linears_us"] = linears((1, 8, 32))
    save()
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
