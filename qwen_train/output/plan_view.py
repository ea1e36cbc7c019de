"""Will it fit: bytes by component on each card and layout, for the terminal, as JSON, and the README's table."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qwen_train.command_line import load_config
from qwen_train.config import REPOSITORY, DPOConfig, SFTConfig
from qwen_train.model.memory import CARDS, GIB, Candidate, Shape, Sharding, fitting, usable
from qwen_train.model.shapes import shape_of
from qwen_train.train.measure import Measured
from qwen_train.train.sharding import why_unshardable

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

FIELDS = ("batch.tokens_per_microbatch", "model.checkpoint_layers")
"""What a plan gives values for, to be copied."""
NAME_WIDTH = 24  # characters of a card's name in a line
COLUMN_GAP = 2  # characters between columns, of which one is rich's own


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
            fits, candidate = fitting(config, shape, longest_row(config), int(free * GIB), Sharding(over))
            made.append(Layout(card, gpus, over, free, fits, candidate))
    return made


def describe(config: SFTConfig, shape: Any) -> str:
    """The model, the task and the mode in a line."""
    task = "DPO" if isinstance(config, DPOConfig) else "SFT"
    base = {"none": f"base in {config.model.dtype}", "nf4": "base in NF4", "fp8": "base in fp8"}
    mode = f"LoRA r {config.lora.r}, {base[config.model.quantization]}" if config.lora.enabled else "every weight"
    sizes = Shape.of(shape)
    count = sizes.parameters
    parameters = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    return (
        f"{config.model.path}: {parameters} parameters, {sizes.layers} layers; {task} of {mode}; "
        f"longest row {longest_row(config):,} tokens"
    )


def print_plan(layouts: Sequence[Layout], title: str, console: Console) -> None:
    """GiB a GPU by component, a column for each layout; several tables where the terminal is too narrow for one."""
    console.print(title, markup=False)
    estimates = [layout.candidate.estimate for layout in layouts]
    names = [name for name in COMPONENTS if any(getattr(estimate, name) for estimate in estimates)]
    columns = [_column(layout, names) for layout in layouts]
    labels = [*(COMPONENTS[name] for name in names), "together", "can be used", "activations, KiB a token", *FIELDS, ""]
    label_width = max(map(len, FIELDS))  # names that are to be copied are not cut
    for shown in _side_by_side(columns, console.width - label_width):
        table = Table(
            box=box.SIMPLE_HEAD,
            title="\nGiB a GPU",
            title_justify="left",
            show_edge=False,
            pad_edge=False,
            padding=(0, 0, 0, COLUMN_GAP - 1),
        )
        table.add_column("", min_width=label_width)
        for column in shown:
            table.add_column(column[0], justify="right", min_width=_width(column))
        for row, label in enumerate(labels, start=1):
            if label.startswith("activations, "):
                table.add_section()
            table.add_row(label, *(column[row] for column in shown))
        console.print(table)


def _side_by_side(columns: Sequence[list[str]], room: int) -> Iterator[list[list[str]]]:
    """Columns cut into tables of at most `room` characters, one column at least."""
    shown: list[list[str]] = []
    for column in columns:
        if shown and sum(_width(one) + COLUMN_GAP for one in [*shown, column]) > room:
            yield shown
            shown = []
        shown.append(column)
    yield shown


def _column(layout: Layout, components: Sequence[str]) -> list[str]:
    """Heading and cells of a layout, as in `print_plan`'s labels."""
    name = layout.card if layout.gpus == 1 else f"{layout.gpus} x {layout.card}"
    estimate = layout.candidate.estimate
    sizes = [getattr(estimate, component) for component in components]
    return [
        "\n".join([*textwrap.wrap(name, NAME_WIDTH), layout.accelerate]),
        *(f"{size / GIB:.1f}" for size in [*sizes, estimate.total, usable(int(layout.free_gib * GIB))]),
        f"{estimate.activations_per_token / 1024:,.0f}",
        f"{layout.candidate.tokens:,}",
        str(layout.candidate.recomputed),
        "fits" if layout.fits else "DOES NOT FIT",
    ]


def _width(column: Sequence[str]) -> int:
    return max(len(line) for cell in column for line in cell.splitlines())


def print_measured(measured: Measured, console: Console) -> None:
    pairs = "" if measured.pairs_per_second is None else f", {measured.pairs_per_second:.2f} pairs/s"
    processes = f"{measured.world_size} process{'es' * (measured.world_size > 1)}"
    # The estimate is of a GPU's memory, in which no Python and no library lies.
    beside = "resident memory of the process" if measured.device == "cpu" else f"estimated {measured.estimated_gib:.1f}"
    console.print(
        f"measured on {processes}, full micro-batches of the longest rows, all supervised:\n"
        f"  batch.tokens_per_microbatch {measured.tokens_per_microbatch}, model.checkpoint_layers "
        f"{measured.checkpoint_layers}\n"
        f"  peak {measured.peak_gib:.1f} GiB, {beside}\n"
        f"  {measured.tokens_per_second:,.0f} tokens/s{pairs}, {measured.model_tflops:,.1f} model TFLOP/s a GPU\n"
        f"  {measured.step_seconds:.2f} s a step, {measured.first_step_seconds:.1f} s to the end of the first, "
        f"{measured.compiled_graphs} compiled graphs",
        markup=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The README's table


def shipped_configs() -> list[tuple[str, SFTConfig, Any]]:
    """(name, config, shape) of the configs in configs/, small models first."""

    def order(path: Path) -> tuple[float, bool, str]:
        task, _, size, _ = path.stem.split("_")
        return float(size.removesuffix("b")), task != "sft", path.stem

    paths = sorted((REPOSITORY / "configs").glob("*_qwen*_*b_*.yaml"), key=order)
    kinds = [DPOConfig if path.stem.startswith("dpo") else SFTConfig for path in paths]
    configs = [load_config(kind, ["--config", str(path)])[0] for kind, path in zip(kinds, paths, strict=True)]
    return [(path.name, config, shape_of(config.model)) for path, config in zip(paths, configs, strict=True)]


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
    best = min(fitting, key=lambda layout: layout.candidate.time)
    one = best.candidate
    words = f"{one.estimate.total / GIB:.1f} ({one.tokens:,}; {one.recomputed})"
    return f"FSDP2 {words}" if best.shards > 1 else words
