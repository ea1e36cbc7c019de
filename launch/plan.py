"""Will it fit, and how fast: `python launch/plan.py [--config FILE.yaml] [--gpus N] [--memory GIB] [--measure]`.

Takes the very config of launch/sft.py or launch/dpo.py; needs neither data nor weights nor a GPU. `--measure` trains
random weights of that shape for a few worst-case steps, on several GPUs under `accelerate launch`. Exit code: 0 it
fits; 1 it does not; 2 a config or an option that cannot be used.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from qwen_train.config import REPOSITORY, DPOConfig, SFTConfig, load_config, load_for_tool, print_errors, tool_parser
from qwen_train.model.adapters import resolve_start
from qwen_train.model.memory import GIB, DoesNotFitError
from qwen_train.model.shapes import shape_of
from qwen_train.output.plan_view import (
    CARDS,
    Layout,
    describe,
    longest_row,
    markdown_table,
    plan,
    print_measured,
    print_plan,
)
from qwen_train.train.distributed import Run
from qwen_train.train.preflight import check_packages
from qwen_train.train.probe import idle_gpus, measure
from qwen_train.train.sharding import check_shardable
from qwen_train.train.signals import Interrupted

PIPE_WIDTH = 200


def main(argv: list[str]) -> int:
    """Plan, measure, and return the exit code. Raises ValueError or ArgumentError for mistakes."""
    options, others = parser().parse_known_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if options.table:
        console.print(markdown_table([read(path) for path in family()]), markup=False, soft_wrap=True)
        return 0
    check(options)
    _, config, _ = load_for_tool(options, others)
    if config.model.continues:
        config, _ = resolve_start(config)  # its rank is that of the adapter
    if options.shards:
        check_shardable(config)
    shape = shape_of(config.model)
    if not options.measure:
        layouts = plan(config, shape, memory(options), options.gpus, options.shards)
        report(options, console, describe(config, shape), layouts)
        for note in idle_gpus(config, options.gpus):
            print(note, file=sys.stderr)
        return 0 if any(layout.fits for layout in layouts) else 1
    run = Run(config.run.seed, config.run.deterministic)
    try:
        run.check(config)
        check_packages(config)
        measured = measure(run, config, shape, longest_row(config), options.steps)
    finally:
        run.close()
    if run.is_main and options.json:
        print(json.dumps({"plan": describe(config, shape), "measured": dataclasses.asdict(measured)}))
    elif run.is_main:
        console.print(describe(config, shape), markup=False)
        print_measured(measured, console)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the plan itself; all others are the config's."""
    made = tool_parser("plan.py", "Will it fit, and how fast. Exit code 0 it fits, 1 it does not, 2 unusable.")
    made.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the run (default 1)")
    made.add_argument("--shards", type=int, metavar="N", help="GPUs that share one copy of the model (HSDP)")
    made.add_argument("--memory", type=float, metavar="GIB", help="free memory of a GPU; default: this machine's, or "
                      + ", ".join(CARDS))  # fmt: skip
    made.add_argument("--measure", action="store_true", help="train random weights for a few worst-case steps")
    made.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps after the warm-up (default 5)")
    made.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    made.add_argument("--table", action="store_true", help="print the README's table of all configs, and nothing else")
    return made


def check(options: argparse.Namespace) -> None:
    """Refuse (ValueError) numbers that mean nothing, and options that do not go together."""
    for name in ("gpus", "shards", "memory", "steps"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:  # not so for nan
            raise ValueError(f"--{name}: must be a number > 0, got {value}")
    if options.measure and (options.gpus > 1 or options.shards or options.memory):
        raise ValueError(
            "--measure: takes the GPUs that there are, one a process of accelerate launch; leave out --gpus, --shards "
            "and --memory"
        )
    if options.shards is not None and (options.gpus % options.shards or options.shards == 1):
        raise ValueError(
            f"--shards: must divide --gpus {options.gpus} and be more than 1, got {options.shards}; 8 is a machine of 8"
        )


def memory(options: argparse.Namespace) -> dict[str, float]:
    """Cards to plan for: name -> free GiB."""
    if options.memory is not None:
        return {f"{options.memory:g} GiB free": options.memory}
    if torch.cuda.is_available():
        return {torch.cuda.get_device_name(): torch.cuda.mem_get_info()[0] / GIB}
    return CARDS


def report(options: argparse.Namespace, console: Console, title: str, layouts: list[Layout]) -> None:
    """Print the layouts under what is planned: tables, or with `--json` one line."""
    if options.json:
        print(json.dumps({"plan": title, "layouts": [layout.as_dict() for layout in layouts]}))
    else:
        print_plan(layouts, title, console)


def family() -> list[Path]:
    """The shipped configs, small models first."""

    def order(path: Path) -> tuple[float, str]:
        return float(path.stem.split("_")[2].removesuffix("b")), path.stem.split("_")[0] != "sft", path.stem

    return sorted((REPOSITORY / "configs").glob("*_qwen*_*b_*.yaml"), key=order)


def read(path: Path) -> tuple:
    """(name, config, shape) of a shipped config."""
    config, _ = load_config(DPOConfig if path.stem.startswith("dpo") else SFTConfig, ["--config", str(path)])
    return path.name, config, shape_of(config.model)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except (ValueError, argparse.ArgumentError) as error:
        if os.environ.get("RANK", "0") == "0":
            print_errors(str(error))
        code = 1 if isinstance(error, DoesNotFitError) else 2
    except torch.OutOfMemoryError as error:  # of numbers that are given; `auto` ones become smaller
        print_errors(f"does not fit: out of memory ({str(error).splitlines()[0]})")
        code = 1
    except Interrupted as error:
        print_errors(str(error))
        code = 130
    sys.exit(code)
