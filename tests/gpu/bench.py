"""Speed and memory of training steps in the 7B's shape on one GPU, by the parts that the real loops are made of.

    python tests/gpu/bench.py --model DIR --sft sft.jsonl --dpo dpo.jsonl --out DIR CASE [CASE ...]

`--model`: a folder with config.json and the tokenizer (weights are random); the JSONL files are any corpus.
CASE is `name:key=value,...` over the defaults in CASES, such as `sft`, `sft:tokens=8192,checkpoint=28` or
`dpo:quantization=fp8`. One JSON line a case: tokens (real ones) a second as the median over steps and over all time,
pairs a second, peak memory, seconds to the first step, compiled graphs, clock and power. Warm-up steps are left out.

`off=rotary+head+...` takes parts out (OFF says which); `pad=8` pads micro-batches of 8 sequences to their longest, as a
plain loop does; `share=False` repeats the prompt of a pair; `reference=precomputed` leaves DPO's second forward away.
ladder.py runs many cases and a peer, and writes the table of docs/measured.md.
"""

import argparse
import gc
import itertools
import json
import re
import statistics
import sys
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from qwen_train.config import (
    BatchConfig,
    DataConfig,
    DPOConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SFTConfig,
)
from qwen_train.data.chat import ChatOptions
from qwen_train.data.packing import Batch
from qwen_train.data.stream import (
    MicroBatches,
    Stream,
    collate_conversations,
    collate_preferences,
    packed_lengths,
    prefetch,
)
from qwen_train.data.tokenize import tokenize
from qwen_train.loss.preference import LossConfig, preference_loss
from qwen_train.model import fuse, kernels, last_layer, load, logprobs
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.model.packed import PackedLM
from qwen_train.train.distributed import Run
from qwen_train.train.metrics import peak_memory_gib
from qwen_train.train.optim import build_optimizer
from qwen_train.train.reference import score_pairs

DEFAULTS = {
    "tokens": 18432,
    "checkpoint": 0,
    "quantization": "none",
    "rank": 64,
    "sequences": 64,
    "steps": 8,
    "warm": 3,
    "compile": True,
    "full": False,
    "chunk": 4096,
    "supervise": "all",
    "attention": "auto",
    "reference": "online",
    "optim": "adamw",
    "lr": 1e-5,
    "off": "",
    "pad": 0,
    "share": True,
    "profile": False,
}
CASES = {"sft": {}, "dpo": {"rank": 32, "sequences": 48}}


def parse_case(text: str) -> dict:
    name, _, rest = text.partition(":")
    case = {"task": name, **DEFAULTS, **CASES[name]}
    for pair in filter(None, rest.split(",")):
        key, value = pair.split("=")
        kind = type(DEFAULTS[key])
        case[key] = value == "True" if kind is bool else kind(value)
    return case


def make_config(case: dict, args: argparse.Namespace) -> SFTConfig:
    sections = {
        "model": ModelConfig(
            path=args.model,
            from_scratch=True,
            quantization=case["quantization"],
            compile=case["compile"],
            checkpoint_layers=case["checkpoint"],
            head_chunk=case["chunk"],
            attention=case["attention"],
            dtype=args.dtype,
        ),
        "lora": LoraConfig(enabled=not case["full"], r=case["rank"]),
        "data": DataConfig(
            train=args.sft if case["task"] == "sft" else args.dpo, max_length=2048, supervise=case["supervise"]
        ),
        "batch": BatchConfig(sequences_per_step=case["sequences"], tokens_per_microbatch=case["tokens"]),
        "optim": OptimConfig(lr=case["lr"], name=case["optim"]),
        "run": RunConfig(steps=case["steps"]),
    }
    return SFTConfig(**sections) if case["task"] == "sft" else DPOConfig(**sections)


@cache
def tokenized(path: str, task: str, supervise: str, model: str):
    config = DataConfig(train=path, max_length=2048, supervise=supervise)
    tokenizer = load_tokenizer(ModelConfig(path=model))
    options = ChatOptions.from_config(config)
    return tokenize(task, path, tokenizer, options=options, workers=8, cache_dir=config.cache_dir)


def make_stream(config: SFTConfig, case: dict) -> Stream:
    data = tokenized(config.data.train, case["task"], case["supervise"], config.model.path)
    pairs = case["task"] == "dpo"
    return (PaddedStream if case["pad"] else Stream)(
        config,
        lengths=packed_lengths(data.dataset, case["share"]),
        total_weights=np.ones(len(data)) if pairs else data.column("total_weight"),
        collate=collate_preferences(data.dataset, case["share"]) if pairs else collate_conversations(data.dataset),
        tokens_per_microbatch=case["pad"] or config.batch.tokens_per_microbatch,
        sources=data.column("source"),
        source_weights=[source.weight for source in data.sources],
    )


class PaddedStream(Stream):
    """Micro-batches of a fixed number of sequences in the stream's order, each padded to its longest."""

    def __init__(self, config: SFTConfig, *, tokens_per_microbatch: int, **rest) -> None:
        super().__init__(config, tokens_per_microbatch=1 << 30, **rest)
        self.width = tokens_per_microbatch

    def __getitem__(self, step: int) -> MicroBatches:
        whole = super().__getitem__(step)
        rows = self.rows(step)
        groups = [rows[start : start + self.width] for start in range(0, len(rows), self.width)]
        return replace(whole, batches=[padded(self.collate(group)) for group in groups])


def padded(batch: Batch) -> Batch:
    starts = batch.cu_seqlens_q.long()
    lengths = starts.diff()
    width, count = int(lengths.max()), len(lengths)
    sequence = torch.repeat_interleave(torch.arange(count), lengths)
    place = sequence * width + torch.arange(len(sequence)) - starts[sequence]
    bounds = torch.arange(count + 1, dtype=torch.int32) * width
    return replace(
        batch,
        input_ids=torch.zeros(count * width, dtype=torch.int64).index_copy(0, place, batch.input_ids),
        position_ids=torch.arange(width).repeat(count),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_q=width,
        max_k=width,
        target_positions=place[batch.target_positions],
    )


FORWARD = PackedLM.forward


def forward_all_positions(model: PackedLM, batch: Batch):
    """Scores of every position (of token 0 where nothing is supervised), and of them the asked ones."""
    everywhere = torch.arange(batch.num_tokens, device=batch.input_ids.device)
    targets = torch.zeros_like(everywhere).index_copy(0, batch.target_positions, batch.targets)
    scores = FORWARD(model, replace(batch, target_positions=everywhere, targets=targets))
    return type(scores)(*(value.index_select(0, batch.target_positions) for value in scores))


def whole_last_layer(layer, hidden_states, packed_rows=None, **kwargs):
    out = type(layer).forward(layer, hidden_states, **kwargs)
    return out if packed_rows is None else out.index_select(1, packed_rows)


def nothing(*_, **__) -> tuple[()]:
    """No module is fused, no layer counts as one that can be, no kernel is used, nothing is traced."""
    return ()


OFF = {
    "lora": ((load, "fuse_lora", nothing), (load, "fuse_norms", nothing)),  # PEFT's forwards, transformers' modules
    "feed_forward": ((fuse, "_fuses_mlp", nothing),),  # gate|up and down apart, Inductor's product between them
    "rotary": ((fuse, "_fuses_attention", nothing),),  # transformers' rotary embeddings and copies
    "norms": ((load, "fuse_norms", nothing),),  # transformers' RMSNorm
    "wide": ((fuse, "_wide_groups", nothing),),  # adapters of gate|up by the product's kernel, not a longer sum
    "open": ((kernels, "is_traced", nothing),),  # the residual stream's gradient added in a pass of its own
    "rows": ((last_layer, "forward", whole_last_layer),),  # the last layer's feed-forward at all positions
    "head": ((logprobs, "use_kernels", nothing),),  # the head's softmax by torch.compile
    "supervised": ((PackedLM, "forward", forward_all_positions),),  # the head at all positions
}
"""Parts that can be taken out, and what then stands in the place of what."""
WHOLE = [(owner, name, getattr(owner, name)) for places in OFF.values() for owner, name, _ in places]


def take_out(names: str) -> None:
    """Take parts of the model out (their names with + between them), and put the others back."""
    off = list(filter(None, names.split("+")))
    assert set(off) <= OFF.keys(), f"{set(off) - OFF.keys()}: one of {', '.join(OFF)}"
    for owner, name, value in (*WHOLE, *(place for part in off for place in OFF[part])):
        setattr(owner, name, value)


class Clocks(threading.Thread):
    """Clock (MHz) and power (W) of the GPU while a case runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[int, float]] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.2):
            self.samples.append((torch.cuda.clock_rate(), torch.cuda.power_draw() / 1000))

    def means(self) -> dict[str, float]:
        self.done.set()
        self.join()
        clocks, watts = zip(*self.samples, strict=True)
        return {"clock_mhz": round(statistics.mean(clocks)), "watts": round(statistics.mean(watts))}


def measure(case: dict, args: argparse.Namespace, run: Run) -> dict:
    take_out(case["off"])
    config = make_config(case, args)
    tokenizer = load_tokenizer(config.model)
    stream = make_stream(config, case)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = load_model(config, tokenizer, run.device, Path("/nonexistent"), is_main=False)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    gc.collect()
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sync = torch.cuda.synchronize if cuda else lambda: None
    loss_config = LossConfig()
    times, tokens, sequences, losses, norms, waited = [], [], [], [], [], []
    gap = 0.0
    gc.collect()
    gc.freeze()
    marks: list[list[float]] = []
    clocks = Clocks()
    start = before = time.perf_counter()
    for step, microbatches in prefetch(stream, range(case["steps"]), 4):
        waited.append(time.perf_counter() - before)
        if cuda and step == case["warm"]:
            clocks.start()
        total = 0.0
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)] if cuda else []
        if events:
            events[0].record()
        for batch in run.accumulate(microbatches, step):
            if case["task"] == "sft":
                loss = -(model(batch).logps * batch.weights).sum() / microbatches.total_weight
            else:
                if case["reference"] == "online" or step == 0:
                    with torch.no_grad(), model.adapter_off():
                        expected = model(batch).logps
                else:  # looked up
                    expected = torch.full_like(batch.weights, -12.0)
                logps = model(batch).logps
                if step == 0:
                    gap = max(gap, float((logps.detach() - expected).abs().mean()))
                loss = (
                    preference_loss(score_pairs(logps, batch.sequence_sums(expected), batch), loss_config).sum()
                    / microbatches.total_weight
                )
            run.backward(loss)
            total += loss.detach()
        if events:
            events[1].record()
        norms.append(run.clip_grad_norm(model, 1.0))
        if events:
            events[2].record()
        optimizer.step()
        optimizer.zero_grad()
        if events:
            events[3].record()
        sync()
        marks.append([first.elapsed_time(second) for first, second in itertools.pairwise(events)])
        now = time.perf_counter()
        times.append(now - before)
        before = now
        tokens.append(microbatches.num_tokens)
        sequences.append(microbatches.num_sequences)
        losses.append(float(total))
    warm = case["warm"]
    result = {
        "case": args.label,
        "tokens_per_second": round(sum(tokens[warm:]) / sum(times[warm:])),
        "median": round(statistics.median(n / t for n, t in zip(tokens[warm:], times[warm:], strict=True))),
        "pairs_per_second": round(sum(sequences[warm:]) / sum(times[warm:]), 2) if case["task"] == "dpo" else None,
        "peak_gib": round(peak_memory_gib(run.device), 1),
        "data_wait": round(sum(waited[warm:]) / sum(times[warm:]), 4),
        "first_step_seconds": round(times[0], 1),
        "microbatches": len(microbatches.batches),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "step0_gap_per_token": gap if case["task"] == "dpo" else None,
        "supervised": round(sum(len(batch.targets) for batch in microbatches.batches) / microbatches.num_tokens, 3),
        "losses": [round(loss, 6) for loss in losses],
        "norms": [round(norm, 3) for norm in norms],
        "step_ms": [round(1000 * seconds) for seconds in times],
        "forward_backward_clip_update_ms": [[round(ms, 1) for ms in mark] for mark in marks],
        "seconds": round(time.perf_counter() - start, 1),
        **(clocks.means() if clocks.samples else {}),
    }
    if case["profile"] and cuda:
        _, microbatches = next(iter(prefetch(stream, range(1, 2), 0)))
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            for batch in run.accumulate(microbatches, 0):
                run.backward(-(model(batch).logps * batch.weights).sum() / microbatches.total_weight)
            sync()
        seen: dict[str, list[float]] = {}
        spans = []
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and event.name != "Command Buffer Full":
                seen.setdefault(event.name, []).append(event.device_time)
                spans.append((event.time_range.start, event.time_range.end))
        rows = sorted(((sum(times), len(times), name) for name, times in seen.items()), reverse=True)
        whole = max(end for _, end in spans) - min(start for start, _ in spans)
        lines = [
            f"{microbatches.num_tokens} tokens, {len(spans)} kernels of {sum(row[0] for row in rows) / 1000:.1f} ms "
            f"within {whole / 1000:.1f} ms"
        ]
        lines += [
            f"{total / 1000:9.2f} ms {count:6d} x {total / count:9.1f} us  {name[:150]}" for total, count, name in rows
        ]
        (Path(args.out) / f"profile-{re.sub('[^a-z0-9]+', '-', args.label)}.txt").write_text("\n".join(lines[:90]))
    return result


def clear() -> None:
    """Give back what the last case held: a model is full of cycles, and was frozen for the collector."""
    torch._dynamo.reset()
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "sft", "dpo", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("cases", nargs="+")
    args = parser.parse_args()
    run = Run(seed=0, deterministic=False)
    for text in args.cases:
        args.label = text
        try:
            result = measure(parse_case(text), args, run)
        except (RuntimeError, ValueError) as error:  # one case that fails must not cost the others' time on the machine
            result = {"case": text, "error": f"{type(error).__name__}: {str(error)[:1500]}"}
        line = json.dumps(result)
        print(line, flush=True)
        with open(Path(args.out) / "bench.jsonl", "a") as file:
            file.write(line + "\n")
        clear()


if __name__ == "__main__":
    sys.exit(main())
