"""Real worst-case steps, by which `auto` values are measured before training."""

import gc
import math
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from qwen_train.config import Config, DPOConfig, SFTConfig
from qwen_train.data.packing import Batch, pack_pairs, pack_sequences
from qwen_train.model.attention import PACKAGES
from qwen_train.model.memory import GIB, candidates, does_not_fit, has_auto, with_candidate
from qwen_train.model.packed import PackedLM
from qwen_train.train.distributed import Run

MEASURED_SHARE = 0.95
"""Of the memory that this process can have, what a measured peak may take: the rest is fragmentation."""
NUM_MICRO_BATCHES = 2
"""Of a measured step: the second one finds the gradients of the first in memory."""
WARM_TOKENS, WARM_ROW = 64, 32


def worst_case(config: SFTConfig, vocab: int, tokens: int, longest: int) -> Batch:
    """A micro-batch of `tokens` tokens in rows (or pairs) of `longest` and a shorter one, every token supervised.

    A rest that is too short for a row, at most three tokens, is left out.
    """
    generator = np.random.default_rng(0)
    pairs = isinstance(config, DPOConfig)
    prompts = 2 if pairs and not config.reference.share_prompt else 1  # type: ignore[attr-defined]
    lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest > 2 + prompts else [])
    rows = [generator.integers(0, vocab, length) for length in lengths]
    if not pairs:
        return pack_sequences([(ids, np.r_[0.0, np.ones(len(ids) - 1)]) for ids in rows], range(len(rows)))
    middle = [(len(ids) + 2 - prompts) // 2 for ids in rows]
    made = [(ids[:1], ids[1:m], ids[m : len(ids) + 1 - prompts]) for ids, m in zip(rows, middle, strict=True)]
    return pack_pairs(made, range(len(rows)), share_prompt=prompts == 1)


def idle_gpus(config: SFTConfig, gpus: int) -> list[str]:
    """What to say where a step has fewer rows than there are GPUs."""
    rows = config.batch.sequences_per_step
    if gpus <= rows:
        return []
    return [
        f"batch.sequences_per_step: a step of {rows} leaves {gpus - rows} of {gpus} GPUs without work; raise it, or "
        "use fewer GPUs"
    ]


def settle(
    run: Run, given: Config, config: Config, model: PackedLM, optimizer: Optimizer, longest: int, shape: Any
) -> Config:
    """`config`, in which the estimate has written out the `auto` values of `given`, after real worst-case steps.

    A forward and backward of two full micro-batches: where memory runs out on any rank, or would with the optimizer's
    states, the next candidate that needs less is tried. Weights, optimizer and random state stay as they are. Also
    finds out whether the layers compile, forward and backward. On the CPU, and with numbers given, that is all.

    Raises DoesNotFitError if nothing does. Under FSDP2 a rank that runs out of memory cannot be saved, as the others
    wait for it.
    """
    run.note(*idle_gpus(config, run.world_size))
    if run.device.type == "cuda" and given.model.attention == "auto":
        run.note(f"auto: model.attention: {PACKAGES[model.attention]}")
    if config.model.compile:
        _try(run, model, optimizer, worst_case(config, shape.vocab_size, WARM_TOKENS, WARM_ROW))
    free = run.free_memory()
    if free is None or not has_auto(given):
        return config
    possible = candidates(given, shape, longest, run.sharding)
    candidate = next(one for one in possible if with_candidate(given, one.recomputed, one.tokens) == config)
    while True:
        model.layers.recompute(candidate.recomputed)
        peak = _try(run, model, optimizer, worst_case(config, shape.vocab_size, candidate.tokens, longest))
        coming = 0 if optimizer.state else candidate.estimate.optimizer
        room = MEASURED_SHARE * _obtainable(run, free)
        excess = run.maximum(float("inf") if peak is None else peak + coming - room)
        what = f"batch.tokens_per_microbatch {candidate.tokens}, model.checkpoint_layers {candidate.recomputed}"
        if excess <= 0:
            assert peak is not None
            run.note(
                f"auto: {what}: {(peak + coming) / GIB:.1f} GiB measured, {candidate.estimate.total / GIB:.1f} "
                f"estimated, {room / GIB:.1f} can be used"
            )
            return with_candidate(given, candidate.recomputed, candidate.tokens)
        least = min(excess, 0.03 * candidate.estimate.total)
        smaller = [one for one in possible if one.estimate.total <= candidate.estimate.total - least]
        if not smaller:
            raise does_not_fit(given, shape, candidate.recomputed, candidate.tokens, int(room), run.sharding)
        reason = "out of memory" if math.isinf(excess) else "too much memory"
        run.note(f"auto: {what}: {reason}, trying the next smaller one")
        candidate = smaller[0]


def _obtainable(run: Run, free: int) -> int:
    """Bytes that this process can have: what is free and what its allocator holds."""
    if run.device.type != "cuda":
        return free
    return torch.cuda.mem_get_info(run.device)[0] + torch.cuda.memory_reserved(run.device)


def _try(run: Run, model: PackedLM, optimizer: Optimizer, batch: Batch) -> int | None:
    """Peak bytes of the forwards and backwards of one rank's micro-batches (0 on the CPU); None if memory ran out."""
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(run.device)
    try:
        with torch.random.fork_rng(devices=[run.device] if cuda else []):
            _forward_backward(run, model, batch)
        return torch.cuda.max_memory_allocated(run.device) if cuda else 0
    except torch.OutOfMemoryError as error:
        if run.sharded:
            raise ValueError(
                f"batch.tokens_per_microbatch: out of memory with {batch.num_tokens}, and under FSDP2 no other value "
                "can be tried, since the other ranks are mid-step; set it to half, or raise "
                "model.checkpoint_layers"
            ) from error
        return None
    finally:
        optimizer.zero_grad()
        if cuda:
            gc.collect()  # the traceback's frames may hold activations in cycles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(run.device)  # what was tried is not what training takes


def _forward_backward(run: Run, model: PackedLM, batch: Batch) -> None:
    batch = batch.to(run.device)
    for _ in range(NUM_MICRO_BATCHES):
        loss = -(model(batch).logps * batch.weights).mean()
        try:
            run.backward(loss)
        except RuntimeError as error:
            # A graph of backward that does not compile shows here; one of forward is handled by the layers themselves.
            compiled = model.layers.compiled and model.layers.fallback.reason is None
            if not compiled or run.sharded or isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
                raise
            model.layers.fallback.give_up(error)
            run.backward(-(model(batch).logps * batch.weights).mean())
