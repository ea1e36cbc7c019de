"""Speed and memory of training steps in the 7B's shape on one GPU, by the parts that the real loops are made of.

    python tests/gpu/bench.py --model DIR --sft sft.jsonl --dpo dpo.jsonl --out DIR CASE [CASE ...]

`--model`: a folder with config.json and the tokenizer (weights are random); the JSONL files are any corpus.
CASE is `name:key=value,...` over the defaults in CASES, such as `sft`, `sft:tokens=8192,checkpoint=28` or
`dpo:quantization=fp8`. One JSON line a case: tokens (real ones) a second as the median over steps and over all time,
pairs a second, peak memory, seconds to the first step, compiled graphs. Warm-up steps are left out.
"""

import argparse
import gc
import itertools
import json
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from qwen_train.config import BatchConfig, DataConfig, DPOConfig, LoraConfig, ModelConfig, OptimConfig, SFTConfig
from qwen_train.data.chat import ChatOptions
from qwen_train.data.stream import Stream, collate_conversations, collate_preferences, packed_lengths, prefetch
from qwen_train.data.tokenize import tokenize_conversations, tokenize_preferences
from qwen_train.loss.preference import LossConfig, preference_loss
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.train.distributed import Run
from qwen_train.train.metrics import peak_memory_gib
from qwen_train.train.optim import build_optimizer
from qwen_train.train.reference import score_pairs, sequence_sums

DEFAULTS = {
    "tokens": 16384,
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
        "optim": OptimConfig(lr=1e-5, name=case["optim"]),
    }
    return SFTConfig(**sections) if case["task"] == "sft" else DPOConfig(**sections)


def make_stream(config: SFTConfig, tokenizer, case: dict) -> Stream:
    tokenize = tokenize_conversations if case["task"] == "sft" else tokenize_preferences
    data = tokenize(config.data.train, tokenizer=tokenizer, options=ChatOptions.from_config(config.data), workers=8)
    pairs = case["task"] == "dpo"
    return Stream(
        lengths=packed_lengths(data.dataset),
        total_weights=np.ones(len(data)) if pairs else data.column("total_weight"),
        collate=collate_preferences(data.dataset, True) if pairs else collate_conversations(data.dataset),
        sequences_per_step=config.batch.sequences_per_step,
        tokens_per_microbatch=config.batch.tokens_per_microbatch,
        seed=config.run.seed,
    )


def measure(case: dict, args: argparse.Namespace, run: Run) -> dict:
    config = make_config(case, args)
    tokenizer = load_tokenizer(config.model)
    stream = make_stream(config, tokenizer, case)
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
    start = before = time.perf_counter()
    for step, microbatches in prefetch(stream, range(case["steps"]), 4, pin_memory=True):
        waited.append(time.perf_counter() - before)
        total = 0.0
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)] if cuda else []
        if events:
            events[0].record()
        for batch in run.accumulate(microbatches, step):
            if case["task"] == "sft":
                loss = -(model(batch).logps * batch.weights).sum() / microbatches.total_weight
            else:
                with torch.no_grad(), model.adapter_off():
                    expected = model(batch).logps
                logps = model(batch).logps
                if step == 0:
                    gap = max(gap, float((logps.detach() - expected).abs().mean()))
                loss = (
                    preference_loss(score_pairs(logps, sequence_sums(expected, batch), batch), loss_config).sum()
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
        "losses": [round(loss, 4) for loss in losses],
        "norms": [round(norm, 3) for norm in norms],
        "step_ms": [round(1000 * seconds) for seconds in times],
        "forward_backward_clip_update_ms": [[round(ms, 1) for ms in mark] for mark in marks],
        "seconds": round(time.perf_counter() - start, 1),
    }
    if case["profile"] and cuda:
        _, microbatches = next(iter(prefetch(stream, range(1, 2), 0, pin_memory=True)))
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            for batch in run.accumulate(microbatches, 0):
                run.backward(-(model(batch).logps * batch.weights).sum() / microbatches.total_weight)
            sync()
        table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90)
        (Path(args.out) / f"profile-{re.sub('[^a-z0-9]+', '-', args.label)}.txt").write_text(table)
    return result


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
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
