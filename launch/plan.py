"""Will it fit, and how fast: `python launch/plan.py [--config FILE.yaml] [--gpus N] [--memory GIB] [--measure]`.

Takes the very config of launch/sft.py or launch/dpo.py; needs neither data nor weights nor a GPU. `--measure` trains
random weights of that shape for a few worst-case steps, on several GPUs under `accelerate launch`. Exit code: 0 it
fits; 1 it does not; 2 a config or an option that cannot be used.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qwen_train.command_line import load_for_tool, print_errors, print_warnings, refuse_alike, tool_parser
from qwen_train.config import SFTConfig
from qwen_train.model.memory import CARDS, GIB, DoesNotFitError
from qwen_train.output.console import stdout_console
from qwen_train.train.signals import Interrupted

MEASURED_STEPS = 5


def main(argv: list[str]) -> int:
    """Plan, measure, and return the exit code. Raises ValueError or ArgumentError for mistakes."""
    options, others = parser().parse_known_args(argv)
    check(options, others)
    console = stdout_console()
    if options.table:
        from qwen_train.output import plan_view

        table = plan_view.markdown_table(plan_view.shipped_configs())
        console.print(table, markup=False, soft_wrap=True)
        return 0
    _, config, warnings = load_for_tool(options, others)
    print_warnings(warnings)
    # Only now, as --help and a mistyped field need not wait for transformers.
    from qwen_train.model.adapters import resolve_start
    from qwen_train.model.shapes import shape_of
    from qwen_train.output import plan_view
    from qwen_train.train.probe import idle_gpus
    from qwen_train.train.sharding import check_shardable

    if config.model.continues:
        if Path(str(config.model.adapter)).exists():
            config, _ = resolve_start(config)  # its rank is that of the adapter
        else:
            missing = f"{config.model.adapter} is not there: planned with lora.r {config.lora.r}"
            print(f"model.adapter: {missing}, until the adapter tells its own", file=sys.stderr)
    if options.shards:
        check_shardable(config)
    shape = shape_of(config.model)
    title = plan_view.describe(config, shape)
    if options.measure:
        measure(options, console, config, shape, title)
        return 0
    layouts = plan_view.plan(config, shape, memory(options), options.gpus, options.shards)
    if options.json:
        print(json.dumps({"plan": title, "layouts": [layout.as_dict() for layout in layouts]}))
    else:
        plan_view.print_plan(layouts, title, console)
    for note in idle_gpus(config, options.gpus):
        print(note, file=sys.stderr)
    return 0 if any(layout.fits for layout in layouts) else 1


def measure(options: argparse.Namespace, console: Console, config: SFTConfig, shape: Any, title: str) -> None:
    """Train for a few steps; the first process prints what was measured."""
    from qwen_train.output.plan_view import longest_row, print_measured
    from qwen_train.train.distributed import Run
    from qwen_train.train.measure import measure_steps
    from qwen_train.train.preflight import check_packages

    run = Run(config.run.seed, config.run.deterministic)
    try:
        run.check(config)
        check_packages(config)
        if run.is_main and run.device.type == "cpu":
            print_warnings(["--measure: no CUDA device is seen: this measures the CPU, where billions take hours"])
        measured = measure_steps(run, config, shape, longest_row(config), options.steps or MEASURED_STEPS)
    finally:
        run.close()
    if run.is_main and options.json:
        print(json.dumps({"plan": title, "measured": dataclasses.asdict(measured)}))
    elif run.is_main:
        console.print(title, markup=False)
        print_measured(measured, console)


def parser() -> argparse.ArgumentParser:
    """The options of the plan itself; all others are the config's."""
    made = tool_parser("plan.py", "Will it fit, and how fast. Exit code 0 it fits, 1 it does not, 2 unusable.")
    made.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the run (default 1)")
    made.add_argument("--shards", type=int, metavar="N", help="GPUs that share one copy of the model (HSDP)")
    made.add_argument("--memory", type=float, metavar="GIB", help="free memory of a GPU; default: this machine's, or "
                      + ", ".join(CARDS))  # fmt: skip
    made.add_argument("--measure", action="store_true", help="train random weights for a few worst-case steps")
    made.add_argument(
        "--steps", type=int, metavar="N", help=f"measured steps after the warm-up (default {MEASURED_STEPS})"
    )
    made.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    made.add_argument("--table", action="store_true", help="print the README's table of all configs, and nothing else")
    return made


def check(options: argparse.Namespace, others: Sequence[str]) -> None:
    """Refuse (ValueError) numbers that mean nothing, and options (`others`: the config's) that do not go together."""
    for name in ("gpus", "shards", "memory", "steps"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:  # not so for nan
            raise ValueError(f"--{name}: must be a number > 0, got {value}")
    alone = vars(parser().parse_args(["--table"]))
    if options.table and (others or vars(options) != alone):
        more = [f"--{name}" for name, value in vars(options).items() if value != alone[name]] + [*others[:1]]
        raise ValueError(f"--table: is of all shipped configs on the usual cards; leave out {', '.join(more)}")
    if options.steps is not None and not options.measure:
        raise ValueError("--steps: counts measured steps, got no --measure; add it, or leave --steps out")
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


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except (ValueError, argparse.ArgumentError) as error:
        refuse_alike(str(error), code=1 if isinstance(error, DoesNotFitError) else 2)
    except torch.OutOfMemoryError as error:  # of numbers that are given; `auto` ones become smaller
        print_errors(f"does not fit: out of memory ({str(error).splitlines()[0]})")
        code = 1
    except Interrupted as error:
        print_errors(str(error))
        code = 130
    sys.exit(code)
