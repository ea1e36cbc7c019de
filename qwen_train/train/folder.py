"""The folder of a run: whose it is, where training stands in it, how it ended."""

import json
import sys
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from torch.optim import Optimizer

from qwen_train.config import Config, SFTConfig, as_dict, load_config, to_yaml
from qwen_train.model.load import PackedLM, load_trainable, trainable_parameters
from qwen_train.train.checkpoint import (
    config_changes,
    find_checkpoint,
    load_checkpoint,
    require_same_result,
    save_checkpoint,
    verify,
)
from qwen_train.train.distributed import Interrupted, Run, env_is_main
from qwen_train.train.files import clean_leftovers, write_bytes_atomic
from qwen_train.train.metrics import write_status
from qwen_train.train.optim import load_optimizer_state, optimizer_state


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives, and where it goes on."""

    path: Path
    finished: bool
    """Nothing is left to do."""
    run_id: str
    """Made when the run began; a resumed run keeps it."""
    checkpoint: Path | None
    """What to go on from; None: from the start."""
    notes: tuple[str, ...]
    """What a person should hear about it."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def base(self) -> Path:
        """The base weights of a `from_scratch` run."""
        return self.path / "base"


def open_run(config: SFTConfig) -> RunFolder:
    """The folder of `config`'s run, made or found again. Rank 0 only.

    Raises ValueError for a folder that is not this run's.
    """
    assert config.run.name is not None
    path = Path(config.run.dir) / config.run.name
    if config.run.resume not in ("auto", "never") and not Path(config.run.resume).is_dir():
        raise ValueError(
            f"run.resume: {config.run.resume} is not a checkpoint folder; give one, or auto for the newest, or never"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"run.name: {path} is a file; choose another run.name or run.dir")
    if not path.exists() or not any(path.iterdir()):
        return _begin(config, path)
    if config.run.resume == "never":
        raise ValueError(f"run.resume: never, but {path} holds a run already; delete it or choose another run.name")
    return _continue(config, path)


def _begin(config: SFTConfig, path: Path) -> RunFolder:
    checkpoint = None
    if config.run.resume not in ("auto", "never"):
        checkpoint = Path(config.run.resume)
        verify(checkpoint)
        require_same_result(config_changes(_stored_config(checkpoint.parent.parent), as_dict(config)), checkpoint)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path / "config.yaml", to_yaml(config).encode())
        write_bytes_atomic(path / "run_id", uuid.uuid4().hex.encode())
    except OSError as error:
        raise ValueError(f"run.dir: cannot write to {path}: {error.strerror}; choose another run.dir") from None
    return RunFolder(path, False, (path / "run_id").read_text(), checkpoint, ())


def _continue(config: SFTConfig, path: Path) -> RunFolder:
    stored = _stored_config(path)
    changes = config_changes(stored, as_dict(config))
    require_same_result(changes, path)
    notes = [f"{change.field}: {change.old} -> {change.new}" for change in changes]
    if _outcome(path) == "finished":
        return RunFolder(path, True, (path / "run_id").read_text(), None, tuple(notes))
    notes += clean_leftovers(path) + clean_leftovers(path / "checkpoints")
    if config.run.resume == "auto":
        checkpoint, skipped = find_checkpoint(path / "checkpoints")
        notes += [f"{folder}: skipped, {reason}" for folder, reason in skipped]
    else:
        checkpoint = Path(config.run.resume)
        verify(checkpoint)
    notes.append(f"going on from {checkpoint}" if checkpoint else f"{path} has no checkpoint yet: starting anew")
    write_bytes_atomic(path / "config.yaml", to_yaml(config).encode())
    return RunFolder(path, False, (path / "run_id").read_text(), checkpoint, tuple(notes))


def _outcome(path: Path) -> str | None:
    try:
        return json.loads((path / "status.json").read_text())["outcome"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # killed before the first word of it: as good as interrupted


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, dict) or not (path / "run_id").exists():
        raise ValueError(f"run.name: {path} exists and is not the folder of a run; choose another run.name")
    return stored


# ---------------------------------------------------------------------------------------------------------------------
# Where training stands


@dataclass
class Progress:
    """What changes from step to step beside weights and optimizer."""

    step: int = 0
    """Finished optimizer steps."""
    num_tokens: int = 0
    """Tokens trained on, of all ranks."""
    skipped: int = 0
    """Steps whose update was skipped, because the gradient was not finite."""


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def save(
    run: Run, folder: RunFolder, progress: Progress, model: PackedLM, optimizer: Optimizer, config: SFTConfig
) -> None:
    """Write a checkpoint: trained weights, optimizer state, progress. All ranks call it; rank 0 writes."""
    parameters = trainable_parameters(model)
    tensors = {
        "model": run.whole(parameters),
        "optimizer": run.whole(optimizer_state(optimizer, parameters.items())),
    }
    state = {"run_id": folder.run_id, "world_size": run.world_size, "config": as_dict(config), **asdict(progress)}
    if run.is_main:
        save_checkpoint(folder.checkpoints, progress.step, tensors, state, config.run.keep)
    run.barrier()


def restore(folder: RunFolder, model: PackedLM, optimizer: Optimizer) -> Progress:
    """Weights, optimizer and progress of the checkpoint that the run goes on from; a fresh start if there is none."""
    if folder.checkpoint is None:
        return Progress()
    tensors, state = load_checkpoint(folder.checkpoint, check=False)
    load_trainable(model, tensors["model"])
    load_optimizer_state(optimizer, trainable_parameters(model).items(), tensors["optimizer"])
    return Progress(**{field.name: state[field.name] for field in fields(Progress)})


# ---------------------------------------------------------------------------------------------------------------------
# The frame of a script


def run_script(config_class: type[Config], train: Callable[[Config, Run], None]) -> None:
    """Parse the command line, train, and report how it ended: exit code and `status.json`.

    0 finished; 2 refused, a mistake of the user's, in lines without a traceback; 128 + signal interrupted and saved;
    anything else is raised, as it is ours to mend.
    """
    try:
        config, warnings = load_config(config_class, sys.argv[1:])
        run = Run(config.run.seed, config.run.deterministic)
    except ValueError as error:
        _complain(str(error))
        sys.exit(2)
    assert config.run.name is not None
    folder = Path(config.run.dir) / config.run.name
    if run.is_main:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    try:
        train(config, run)
    except Interrupted as interruption:
        _report(run, folder, "interrupted", str(interruption))
        run.close()
        sys.exit(128 + (run.stop_signal or 15))
    except ValueError as error:
        _report(run, folder, "refused", str(error))
        _complain(str(error))
        sys.exit(2)
    except BaseException as error:
        _report(run, folder, "failed", f"{type(error).__name__}: {error}")
        raise
    run.close()


def _report(run: Run, folder: Path, outcome: str, reason: str) -> None:
    """status.json, unless the folder is not (yet) this run's."""
    if run.is_main and (folder / "run_id").exists():
        write_status(folder, outcome, reason)


def _complain(message: str) -> None:
    if env_is_main():
        for line in message.splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)
