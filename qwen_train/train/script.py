"""The frame of a training script: how it starts, and how it ends whatever happens; exit code and `status.json`."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers.utils.logging import disable_progress_bar

from qwen_train.command_line import TIMED_NAME, print_errors, print_warnings, refuse_alike
from qwen_train.config import Config, SFTConfig, as_dict
from qwen_train.data.stream import worker_death
from qwen_train.train.checkpoint import SaveError, saved_step
from qwen_train.train.distributed import Run
from qwen_train.train.folder import free_name, take_back
from qwen_train.train.peers import Departure
from qwen_train.train.signals import COMPILER_INTERRUPTED, START_INTERRUPTED, Interrupted
from qwen_train.train.status import STATUS, is_ours, write_status

OWN_FIELDS = (("run", "name"), ("data", "cache_dir"), ("data", "workers"))
"""What ranks may differ in: a name that is made up from the time (rank 0's counts), and how each makes its batches."""


def run_script(config: Config, warnings: list[str], train: Callable[[Config, Run], None]) -> None:
    """Train, and report how it ended: exit code and `status.json`. `warnings` are about the config.

    0 finished; 2 refused, a mistake of the user's or a disk that does not play along, in lines without a traceback;
    128 + signal interrupted and saved; anything else is raised, as it is ours to mend. A run that is refused before it
    has trained leaves no folder behind.
    """
    disable_progress_bar()  # transformers' own, of loading weights
    try:
        run = Run(config.run.seed, config.run.deterministic)
    except ValueError as error:
        refuse_alike(str(error))
    except Interrupted as error:  # while the processes were still finding each other
        print(error, flush=True)
        sys.exit(128 + signal.SIGTERM)
    assert config.run.name is not None
    name, folder = config.run.name, Path(config.run.dir) / config.run.name
    print_warnings(warnings)
    if (
        run.device.type == "cpu" and config.model.dtype == "bfloat16"
    ):  # a GPU's config; a driver that fails says nothing
        print_warnings(
            ["no CUDA device is seen: training on the CPU; check torch.cuda.is_available() if there is a GPU"]
        )
    if run.peers is not None:
        run.peers.when_gone(lambda departure: os._exit(_follow(run, folder, name, departure)))
    try:
        name = run.from_main(lambda: free_name(config))
        config, folder = replace(config, run=replace(config.run, name=name)), folder.with_name(name)
        require_one_config(run, config)
        train(config, run)
    except BaseException as error:
        early = run.stop_signal is not None and not run.signals.is_training
        run.begin()  # from here on a signal is only noted: the way out is taken already
        departure = run.departure(error, early)
        if departure is not None and not (early and departure.reason):
            sys.exit(_follow(run, folder, name, departure))
        # Libraries that a signal cuts short before training clean up with errors of their own. Later it may have been
        # sent to all processes (Ctrl-C is): a compiler at work on the backward pass is one of them, and dies of it.
        compiling = run.stop_signal is not None and isinstance(error, BackendCompilerFailed)
        cause = Interrupted(START_INTERRUPTED if early else COMPILER_INTERRUPTED) if early or compiling else error
        if isinstance(cause, Interrupted):
            reason = f"{cause}{run.asked_elsewhere}; {_how_to_go_on(name)}"
            run.note(reason)
            _report(run, folder, "interrupted", reason)
            run.close(reason if early or compiling else "")  # in training all ranks leave together
            _end_workers()
            sys.exit(128 + (run.stop_signal or signal.SIGTERM))
        if (explained := _explained(cause)) is not None:
            _refuse(run, folder, *explained)
        reason = f"{type(cause).__name__}: {cause}"
        _report(run, folder, "failed", reason)
        run.close(reason)
        raise
    run.close()


def require_one_config(run: Run, config: SFTConfig) -> None:
    """Refuse (ValueError) other values on some ranks than on rank 0, such as a file that was changed on one machine."""
    values = as_dict(config)
    for section, name in OWN_FIELDS:
        del values[section][name]
    run.require_alike("config", values)


def _follow(run: Run, folder: Path, name: str, departure: Departure) -> int:
    """Report that another rank has gone, without which this one cannot go on; the exit code.

    The first rank that is left of each machine says so; not beside one that has said itself why it leaves.
    """
    assert run.peers is not None
    reason = f"{departure}".splitlines()[0] + f"; {_how_to_go_on(name)}"
    _report(run, folder, "failed", reason)
    gone = departure.member
    has_spoken = departure.reason and gone.machine == run.peers.me.machine
    if not has_spoken and run.rank == run.peers.first_of_machine(without=[gone.rank]):
        print_errors(reason)
    run.close(reason)
    return 1


def _end_workers() -> None:
    """Kill the worker processes that are left: the interpreter's exit would wait for them.

    One that was forked in the moment of the signal can stand at a lock that nobody holds any more, for ever.
    """
    for package in ("multiprocessing", "multiprocess"):  # the second is what `datasets` uses
        if package in sys.modules:
            for worker in sys.modules[package].active_children():
                worker.kill()


def _refuse(run: Run, folder: Path, outcome: str, reason: str) -> NoReturn:
    """Leave with code 2 and `reason`; a folder in which nothing was trained yet is taken away again."""
    if not (run.is_main and take_back(folder)):
        _report(run, folder, outcome, reason)
    run.close(reason)
    if not run.is_main:
        # Most often rank 0 has met the same and says so, and this process is ended meanwhile.
        time.sleep(2)
        reason = "\n".join(f"rank {run.rank}: {line}" for line in reason.splitlines())
    print_errors(reason)
    sys.exit(2)


def _report(run: Run, folder: Path, outcome: str, reason: str) -> None:
    """status.json, where this process has taken the folder over; its step is the one to go on from."""
    if run.is_main and is_ours(folder):
        try:
            write_status(folder, outcome, reason, step=saved_step(folder / "checkpoints"))
        except OSError as error:  # the disk is full, say: the way out goes on
            print_errors(f"{folder / STATUS}: not written, {error.strerror}")


def _how_to_go_on(name: str) -> str:
    """What resumes the run: the same command, which makes up another name where it gave none."""
    return f"go on with --run.name {name}" if TIMED_NAME.fullmatch(name) else "start again to go on"


def _explained(error: BaseException) -> tuple[str, str] | None:
    """Outcome and lines for what the user, or who keeps the machine, can put right; None for what is ours to mend."""
    if isinstance(error, ValueError):
        return "refused", str(error)
    text = None
    if isinstance(error, torch.OutOfMemoryError):
        text = _memory_problem(error)
    elif isinstance(error, RuntimeError):
        text = worker_death(error)
    elif isinstance(error, OSError):
        text = _disk_problem(error)
    return None if text is None else ("failed", text)


def _disk_problem(error: OSError) -> str | None:
    """An error of the file system in one line; None if it is something else."""
    if isinstance(error, SaveError):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "disk"
        return f"{place}: {error.strerror}; free some space, or point run.dir and data.cache_dir at another disk"
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path and its permissions"
    return None


def _memory_problem(error: torch.OutOfMemoryError) -> str:
    """Where a step could not be done again in smaller micro-batches: an update, an evaluation, a reference's scores."""
    what = str(error).split(". GPU")[0].splitlines()[0]
    return (
        f"batch.tokens_per_microbatch: out of memory outside of a step's micro-batches ({what}); lower it, "
        "run.eval_samples or data.max_length, or use model.quantization nf4 or FSDP2"
    )
