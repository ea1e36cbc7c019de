"""Will it fit: bytes by component on each card and layout, for the terminal, as JSON, and the README's table."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qwen_train.config import DPOConfig, SFTConfig
from qwen_train.model.memory import GIB, Candidate, Shape, fitting, usable
from qwen_train.train.probe import Measured
from qwen_train.train.sharding import why_unshardable

CARDS = {"24 GB": 23.5, "48 GB": 47.0, "80 GB": 79.0, "141 GB": 139.5}
"""GiB that are free on an empty card: an RTX 4090, an L40S, an A100 or H100, an H200."""
SHARDED_TIME = 1.04
"""Time of a step under FSDP2 as a multiple, beside whole models: full training of 7B, 8,595 tokens/s on one H200 and
8,287 on each of two."""
COMPONENTS = {
    "weights": "weights",
    "adapters": "adapters (fp32)",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference model",
    "gathered": "gathered by FSDP2",
    "activations": "activations",
    "working": "head chunk, or a layer in backward",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to spread a config over GPUs of one kind, and what `auto` would take there."""

    card: str
    gpus: int
    shards: int
    free_gib: float
    fits: bool
    candidate: Candidate
    """What would be taken, or what needs least."""

    @property
    def accelerate(self) -> str:
        """The file in configs/accelerate/."""
        if self.shards > 1:
            return "fsdp2_hsdp.yaml" if self.shards < self.gpus else "fsdp2.yaml"
        return "ddp.yaml" if self.gpus > 1 else "single.yaml"

    def as_dict(self) -> dict[str, Any]:
        estimate = self.candidate.estimate
        return {
            "card": self.card,
            "gpus": self.gpus,
            "shards": self.shards,
            "accelerate": self.accelerate,
            "free_gib": self.free_gib,
            "fits": self.fits,
            "tokens_per_microbatch": self.candidate.tokens,
            "checkpoint_layers": self.candidate.recomputed,
            "total_bytes": estimate.total,
            "activations_bytes_per_token": estimate.activations_per_token,
            **{f"{name}_bytes": value for name, value in estimate.components.items()},
        }


def longest_row(config: SFTConfig) -> int:
    """Packed tokens of the longest row there may be: both answers of a pair may reach data.max_length."""
    return config.data.max_length * (2 if isinstance(config, DPOConfig) else 1)


def plan(
    config: SFTConfig, shape: Any, cards: dict[str, float], gpus: int = 1, shards: int | None = None
) -> list[Layout]:
    """Every card (name -> free GiB), each GPU with the whole model and, on several, sharded over all of them.

    `shards`: over so many instead, the model once in each group (HSDP). What cannot be sharded is left out.
    """
    sharded = [shards or gpus] if gpus > 1 and why_unshardable(config) is None else []
    made = []
    for card, free in cards.items():
        for over in [1, *sharded] if shards is None else sharded:
            fits, candidate = fitting(config, shape, longest_row(config), int(free * GIB), over)
            made.append(Layout(card, gpus, over, free, fits, candidate))
    return made


def describe(config: SFTConfig, shape: Any) -> str:
    """The model, the task and the mode in a line."""
    task = "DPO" if isinstance(config, DPOConfig) else "SFT"
    base = {"none": f"base in {config.model.dtype}", "nf4": "base in NF4", "fp8": "base in fp8"}
    mode = f"LoRA r {config.lora.r}, {base[config.model.quantization]}" if config.lora.enabled else "every weight"
    sizes = Shape.of(shape)
    return (
        f"{config.model.path}: {sizes.parameters / 1e9:.2f} B parameters, {sizes.layers} layers; {task} of {mode}; "
        f"longest row {longest_row(config):,} tokens"
    )


def print_plan(layouts: Sequence[Layout], title: str, console: Console) -> None:
    """GiB a GPU by component, a column for each layout."""
    console.print(title, markup=False)
    table = Table(box=box.SIMPLE_HEAD, title="GiB a GPU", title_justify="left")
    table.add_column("")
    for layout in layouts:
        name = layout.card if layout.gpus == 1 else f"{layout.gpus} x {layout.card}"
        table.add_column(f"{name}\n{layout.accelerate}", justify="right")
    estimates = [layout.candidate.estimate for layout in layouts]
    for name, words in COMPONENTS.items():
        if any(getattr(estimate, name) for estimate in estimates):
            table.add_row(words, *(f"{getattr(estimate, name) / GIB:.1f}" for estimate in estimates))
    table.add_row("together", *(f"{estimate.total / GIB:.1f}" for estimate in estimates))
    table.add_row("can be used", *(f"{usable(int(layout.free_gib * GIB)) / GIB:.1f}" for layout in layouts))
    table.add_section()
    table.add_row("activations, KiB a token", *(f"{one.activations_per_token / 1024:,.0f}" for one in estimates))
    table.add_row("batch.tokens_per_microbatch", *(f"{layout.candidate.tokens:,}" for layout in layouts))
    table.add_row("model.checkpoint_layers", *(str(layout.candidate.recomputed) for layout in layouts))
    table.add_row("", *("fits" if layout.fits else "DOES NOT FIT" for layout in layouts))
    console.print(table)


def print_measured(measured: Measured, console: Console) -> None:
    pairs = "" if measured.pairs_per_second is None else f", {measured.pairs_per_second:.2f} pairs/s"
    console.print(
        f"measured on {measured.world_size} process(es), full micro-batches of the longest rows, all supervised:\n"
        f"  batch.tokens_per_microbatch {measured.tokens_per_microbatch}, model.checkpoint_layers "
        f"{measured.checkpoint_layers}\n"
        f"  peak {measured.peak_gib:.1f} GiB, estimated {measured.estimated_gib:.1f}\n"
        f"  {measured.tokens_per_second:,.0f} tokens/s{pairs}, {measured.model_tflops:,.1f} model TFLOP/s a GPU\n"
        f"  {measured.step_seconds:.2f} s a step, {measured.first_step_seconds:.1f} s to the end of the first, "
        f"{measured.compiled_graphs} compiled graphs",
        markup=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The README's table


def markdown_table(configs: Sequence[tuple[str, SFTConfig, Any]]) -> str:
    """For each (name, config, shape): GiB a GPU, and in brackets tokens a micro-batch and recomputed layers."""
    header = ["config", "one GPU of 24 GB", "one of 80 GB", "eight of 80 GB"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, config, shape in configs:
        cells = [
            _cell(plan(config, shape, {card: CARDS[card]}, gpus))
            for card, gpus in (("24 GB", 1), ("80 GB", 1), ("80 GB", 8))
        ]
        lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines)


def _cell(layouts: Sequence[Layout]) -> str:
    """The faster of the layouts that fit."""
    fitting = [layout for layout in layouts if layout.fits]
    if not fitting:
        return "-"
    best = min(fitting, key=lambda layout: layout.candidate.time * (SHARDED_TIME if layout.shards > 1 else 1))
    one = best.candidate
    words = f"{one.estimate.total / GIB:.1f} ({one.tokens:,}; {one.recomputed})"
    return f"FSDP2 {words}" if best.shards > 1 else words
