"""Speed and memory of a config by real worst-case steps of random weights: launch/plan.py --measure."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.optim import Optimizer

from qwen_train.config import Config, DPOConfig, SFTConfig, reference_source
from qwen_train.data.packing import Batch
from qwen_train.data.stream import MicroBatches
from qwen_train.loss.preference import preference_loss
from qwen_train.model.compile import compiled_graphs
from qwen_train.model.load import FAMILIES, load_model
from qwen_train.model.memory import GIB, estimate_memory, microbatch_tokens, recomputed_layers, resolve_auto
from qwen_train.model.packed import PackedLM, num_adapter_parameters
from qwen_train.train.distributed import Run
from qwen_train.train.metrics import flops_per_token, peak_memory_gib
from qwen_train.train.optim import build_optimizer
from qwen_train.train.probe import NUM_MICRO_BATCHES, settle, worst_case
from qwen_train.train.reference import Reference, score_pairs
from qwen_train.train.sharding import own_part

WARM_STEPS = 3


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


def measure_steps(run: Run, given: Config, shape: Any, longest: int, steps: int) -> Measured:
    """Train random weights of the config's shape for a few steps of full micro-batches; `auto` values are settled."""
    config = resolve_auto(given, longest, shape, run.free_memory(), run.sharding)
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
    estimate = estimate_memory(config, shape, tokens, recomputed_layers(config), run.sharding)
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
        local = own_part(parameter)
        local.fill_(1.0) if local.ndim < 2 else local.normal_(std=0.02)
