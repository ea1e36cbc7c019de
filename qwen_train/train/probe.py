"""Real worst-case steps: `auto` values measured before training, and the figures of launch/plan.py."""

import dataclasses
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.optim import Optimizer

from qwen_train.config import Config, DPOConfig, SFTConfig, reference_source
from qwen_train.data.packing import Batch, pack_pairs, pack_sequences
from qwen_train.data.stream import MicroBatches
from qwen_train.loss.preference import preference_loss
from qwen_train.model.attention import PACKAGES
from qwen_train.model.compile import compiled_graphs
from qwen_train.model.load import FAMILIES, load_model
from qwen_train.model.memory import (
    GIB,
    candidates,
    does_not_fit,
    estimate_memory,
    has_auto,
    microbatch_tokens,
    recomputed_layers,
    resolve_auto,
    with_candidate,
)
from qwen_train.model.packed import PackedLM, num_adapter_parameters
from qwen_train.train.distributed import Run
from qwen_train.train.metrics import flops_per_token, peak_memory_gib
from qwen_train.train.optim import build_optimizer
from qwen_train.train.reference import Reference, score_pairs

MEASURED_SHARE = 0.95
"""Of the memory that this process can have, what a measured peak may take: the rest is fragmentation."""
NUM_MICRO_BATCHES = 2
"""Of a measured step: the second one finds the gradients of the first in memory."""
WARM_STEPS = 3
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


# ---------------------------------------------------------------------------------------------------------------------
# auto, measured


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
    possible = candidates(given, shape, longest, run.shards)
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
            raise does_not_fit(given, shape, candidate.recomputed, candidate.tokens, int(room), run.shards)
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


# ---------------------------------------------------------------------------------------------------------------------
# launch/plan.py --measure


@dataclasses.dataclass(frozen=True)
class Measured:
    """Real worst-case steps of a config."""

    device: str
    """cuda or cpu."""
    world_size: int
    tokens_per_microbatch: int
    checkpoint_layers: int
    estimated_gib: float
    """Of a GPU: what the training itself takes."""
    peak_gib: float
    """The most of all ranks; on the CPU the whole process's, Python and its libraries included."""
    tokens_per_second: float
    """Of all GPUs; the median step."""
    pairs_per_second: float | None
    model_tflops: float
    """TFLOP/s of one GPU, no recomputation counted."""
    step_seconds: float
    """Median, on the slowest rank, of a step of two micro-batches a GPU."""
    first_step_seconds: float
    compiled_graphs: int


class _ControlTokens:
    """The two ids that a model of random weights asks its tokenizer for."""

    def convert_tokens_to_ids(self, token: str) -> int:
        return int(token in FAMILIES.values())


def measure(run: Run, given: Config, shape: Any, longest: int, steps: int) -> Measured:
    """Train random weights of the config's shape for a few steps of full micro-batches; `auto` values are settled."""
    config = resolve_auto(given, longest, shape, run.free_memory(), run.shards)
    started = time.perf_counter()
    config, model, optimizer, reference = _scratch_run(run, config, shape)
    # As above, with the `auto` values.
    model_given = dataclasses.replace(config.model, checkpoint_layers=given.model.checkpoint_layers)
    given = dataclasses.replace(config, model=model_given, batch=given.batch)
    config = settle(run, given, config, model, optimizer, longest, shape)
    tokens = min(microbatch_tokens(config), config.batch.sequences_per_step * longest)
    batch = worst_case(config, shape.vocab_size, tokens, min(longest, tokens))
    microbatches = MicroBatches(
        batches=[batch] * NUM_MICRO_BATCHES,
        total_weight=1.0,
        num_tokens=NUM_MICRO_BATCHES * batch.num_tokens * run.world_size,
        num_sequences=NUM_MICRO_BATCHES * len(batch.rows) * run.world_size,
        mean_length=batch.mean_length,
        rows=[],
        epoch=0.0,
    )

    def loss(part: Batch) -> torch.Tensor:
        return _loss(config, model, reference, part) / len(part.targets)

    ends = _timed_steps(run, config, model, optimizer, microbatches, loss, WARM_STEPS + steps)
    step_seconds = run.maximum(statistics.median(np.diff(ends[WARM_STEPS - 1 :]).tolist()))
    flops = flops_per_token(
        shape,
        microbatches.mean_length,
        lora_parameters=num_adapter_parameters(model),
        head_fraction=len(batch.targets) / batch.num_tokens,
        reference_forward=reference is not None,
    )
    estimate = estimate_memory(config, shape, tokens, recomputed_layers(config), run.shards)
    rate = microbatches.num_tokens / step_seconds
    return Measured(
        device=run.device.type,
        world_size=run.world_size,
        tokens_per_microbatch=tokens,
        checkpoint_layers=recomputed_layers(config),
        estimated_gib=estimate.total / GIB,
        peak_gib=run.maximum(peak_memory_gib(run.device)),
        tokens_per_second=rate,
        pairs_per_second=microbatches.num_sequences / step_seconds if isinstance(config, DPOConfig) else None,
        model_tflops=rate * flops / run.world_size / 1e12,
        step_seconds=step_seconds,
        first_step_seconds=run.maximum(ends[0] - started),
        compiled_graphs=compiled_graphs(),
    )


def _scratch_run(run: Run, config: Config, shape: Any) -> tuple[Config, PackedLM, Optimizer, Reference | None]:
    """The config without anything to read, and after it model, optimizer and reference of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        scratch = dataclasses.replace(config.model, path=folder, revision=None, from_scratch=True, adapter=None)
        config = dataclasses.replace(config, model=scratch)
        if isinstance(config, DPOConfig) and (not config.lora.enabled or config.reference.source == "start_adapter"):
            start = dataclasses.replace(config.reference, source="auto", path=None)  # of random weights, too
            config = dataclasses.replace(config, reference=start)
        tokenizer: Any = _ControlTokens()
        model = load_model(config, tokenizer, run.device, None, is_main=False, sharded=run.sharded)
        model = run.prepare(model)
        if run.sharded:
            _fill_shards(model)
        optimizer = build_optimizer(model.named_parameters(), config.optim)
        reference = Reference(config, model, tokenizer, run, None) if _asks_reference(config) else None
    return config, model, optimizer, reference


def _timed_steps(
    run: Run,
    config: Config,
    model: PackedLM,
    optimizer: Optimizer,
    microbatches: MicroBatches,
    loss: Callable[[Batch], torch.Tensor],
    count: int,
) -> list[float]:
    """Train for `count` steps; the time (seconds, of `time.perf_counter`) at the end of each."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    ends = []
    for step in range(count):
        for part in run.accumulate(microbatches, step):
            run.backward(loss(part))
        run.average_gradients(model)
        run.clip_grad_norm(model, config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        ends.append(time.perf_counter())
    return ends


def _asks_reference(config: SFTConfig) -> TypeGuard[DPOConfig]:
    """Whether each micro-batch is scored by a reference."""
    return isinstance(config, DPOConfig) and reference_source(config) is not None and not config.reference.precompute


def _loss(config: SFTConfig, model: PackedLM, reference: Reference | None, batch: Batch) -> torch.Tensor:
    if not isinstance(config, DPOConfig):
        return -(model(batch).logps * batch.weights).sum()
    expected = reference.logps(batch) if reference is not None else None
    if expected is None and reference_source(config) is not None:  # precomputed: looked up, from anywhere
        expected = torch.zeros(batch.num_sequences, dtype=torch.float64, device=batch.input_ids.device)
    return preference_loss(score_pairs(model(batch).logps, expected, batch), config.loss).sum()


@torch.no_grad()
def _fill_shards(model: PackedLM) -> None:
    """Random values for shards that no rank has read weights for."""
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.fill_(1.0) if local.ndim < 2 else local.normal_(std=0.02)
