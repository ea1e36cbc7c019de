"""The folder of a run: whose it is, what config it goes by, which checkpoint it goes on from."""

import dataclasses
import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qwen_train.command_line import MADE_UP
from qwen_train.config import SFTConfig, to_yaml
from qwen_train.data.scratch import LEFTOVER
from qwen_train.train.changes import (
    CHANGED,
    ConfigChange,
    accepted,
    besides_places,
    changes_of_result,
    changes_since,
    require_same_result,
    with_resolved,
    written_out,
)
from qwen_train.train.checkpoint import find_checkpoint, saved_step, strangers, verify
from qwen_train.train.distributed import Run
from qwen_train.train.files import clean_leftovers, delete_folder, make_folder, write_bytes_atomic
from qwen_train.train.lock import TakenError, lock_folder, unlock_folder
from qwen_train.train.status import read_status, write_status

SHARED_SECONDS = 30.0  # that a network file system may take to show a new file
BEGINNING = ("run_id", "config.yaml")
"""What is written of a new run first, in this order; a folder with the last is a run's."""


class _Begun(NamedTuple):
    run_id: str
    made: bool
    """There was no folder before."""


_BEGUN: dict[Path, _Begun] = {}


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives, and where it goes on."""

    path: Path
    config: SFTConfig
    """What the run goes by: as given, its `auto` values as they were resolved when it began."""
    finished: bool
    """Nothing is left to do."""
    run_id: str
    """Made when the run began; a resumed run keeps it."""
    checkpoint: Path | None
    """What to go on from; None: from the start."""
    notes: tuple[str, ...]
    """What a person should hear about it."""
    history: list[str] = field(default_factory=list)
    """Changes on the way that shaped the result, a line each (`run.accept_changes`); grows as they are found."""

    @property
    def checkpoints(self) -> Path:
        """Where the run's own checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def base(self) -> Path:
        """The base weights of a `from_scratch` run."""
        return self.path / "base"


def enter_run(run: Run, config: SFTConfig, notes: Sequence[str]) -> RunFolder:
    """The folder of `config`'s run (`open_run`), for all ranks; says where it is and, with `notes`, how it starts.

    Raises ValueError for a run.dir that other machines do not see, where they have to read or write checkpoints.
    """
    folder = run.from_main(lambda: open_run(config))
    run.note(f"run: {folder.path}", *notes, *folder.notes)
    if folder.finished:
        run.note(f"{folder.path} is finished; to train again delete it or choose another run.name")
    elif run.world_size > 1 and (run.sharded or folder.checkpoint):
        _require_shared(run, folder)
    return folder


def open_run(config: SFTConfig) -> RunFolder:
    """The folder of `config`'s run, made or found again, and marked as running. Rank 0 only.

    Raises ValueError for a folder that is not this run's, which is left as it is.
    """
    config = written_out(config)
    assert config.run.name is not None
    path = Path(config.run.dir) / config.run.name
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"run.name: {path} is a link to {path.readlink()}, which is not there; make it, or delete the link"
        )
    notes = lock_folder(path)
    if config.run.resume not in ("auto", "never") and not Path(config.run.resume).is_dir():
        raise ValueError(
            f"run.resume: {config.run.resume} is not a checkpoint folder; give one, or auto for the newest, or never"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"run.name: {path} is a file; choose another run.name or run.dir")
    is_new = _is_free(path)
    if not is_new and config.run.resume == "never":
        raise ValueError(f"run.resume: never, but {path} holds a run already; delete it or choose another run.name")
    folder = _begin(config, path) if is_new else _continue(config, path)
    if folder.checkpoint and (names := strangers(folder.checkpoint)):
        notes += (f"{folder.checkpoint}: not of this checkpoint and left closed: {', '.join(names)}",)
    return dataclasses.replace(folder, notes=(*folder.notes, *notes))


def free_name(config: SFTConfig) -> str:
    """`run.name`; if it was made up from the time, the first of it, it-2, it-3, ... that no other run has. Rank 0 only.

    The name is this process's from then on: of several started in one second each gets its own.
    """
    assert config.run.name is not None
    name, number = config.run.name, 1
    while config.run.name in MADE_UP and not _take(Path(config.run.dir) / name):
        number += 1
        name = f"{config.run.name}-{number}"
    return name


def _take(path: Path) -> bool:
    """Lock the folder of a new run; False if there is one, or another process is about to make it."""
    try:
        lock_folder(path)
    except TakenError:
        return False
    if os.path.lexists(path):
        unlock_folder(path)
        return False
    return True


def _is_free(path: Path) -> bool:
    """Whether a run can begin there: nothing is there, or what a start has left that was killed half way."""
    if not path.exists():
        return True
    names = [child.name for child in path.iterdir()]
    return "config.yaml" not in names and all(LEFTOVER.sub(r"\g<name>", name) in BEGINNING for name in names)


def _begin(config: SFTConfig, path: Path) -> RunFolder:
    checkpoint, history = _named_checkpoint(config)
    run_id = uuid.uuid4().hex
    _BEGUN[path] = _Begun(run_id, made=not path.exists())
    try:
        make_folder(path)  # one that is there, perhaps a link or a disk of its own, is filled and not replaced
        if not _is_free(path):  # a file system without locks
            raise TakenError(f"run.name: another process has just begun in {path}; choose another run.name")
        clean_leftovers(path)
        write_bytes_atomic(path / "run_id", run_id.encode())
        write_bytes_atomic(path / "config.yaml", _with_history(config, history))
        write_status(path, "running")
    except OSError as error:
        take_back(path)
        raise ValueError(f"run.dir: cannot write to {path}: {error.strerror}; choose another run.dir") from None
    return RunFolder(path, config, False, run_id, checkpoint, history, list(history))


def take_back(path: Path) -> bool:
    """Take away again a run that this very process has begun and has not trained; whether there was one."""
    begun = _BEGUN.get(path)
    if begun is None or not path.is_dir() or (path / "metrics.jsonl").exists() or (path / "checkpoints").exists():
        return False
    if not _is_free(path) and (path / "run_id").read_text() != begun.run_id:
        return False
    if begun.made:
        delete_folder(path)
        return True
    for child in sorted(path.iterdir(), key=lambda child: (*(child.name == name for name in BEGINNING),)):
        if child.is_dir():  # its beginning goes last, so that a start after a kill knows the rest
            delete_folder(child)
        else:
            child.unlink()
    return True


def _continue(config: SFTConfig, path: Path) -> RunFolder:
    stored = _stored_config(path)
    config = with_resolved(config, stored)
    changes, status = changes_since(stored, config), read_status(path)
    finished = status.get("outcome") == "finished"
    if finished:
        _require_nothing_new(changes, path)
    shaping = besides_places(changes) if saved_step(path / "checkpoints") else changes
    if not finished and not config.run.accept_changes:
        require_same_result(shaping, path)
    notes = [f"{change.field}: {change.old} -> {change.new}" for change in changes]
    run_id = (path / "run_id").read_text()
    result = path / Path(str(status.get("result", "."))).name
    if finished and result.exists():
        return RunFolder(path, config, True, run_id, None, tuple(notes))
    notes += clean_leftovers(path) + clean_leftovers(path / "checkpoints")
    checkpoint, history = (None, ()) if finished else _named_checkpoint(config)
    checkpoints = path / "checkpoints"
    if checkpoint is None or checkpoint.resolve().parent != checkpoints.resolve():
        # One of another run is where this one began: the same command, run again, must not throw away what it has done.
        own, skipped = find_checkpoint(checkpoints)
        if own is None and skipped:
            reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in skipped)
            raise ValueError(
                f"run.resume: no checkpoint in {checkpoints} is whole ({reasons}); check the disk, or to start over "
                "delete them or choose another run.name"
            )
        if own is None and finished:
            raise ValueError(
                f"{path}: the run is finished, and {result} and its checkpoints are gone; to train it again delete "
                "the folder or choose another run.name"
            )
        notes += [f"{folder}: skipped, {reason}" for folder, reason in skipped]
        if checkpoint is None or own is not None:
            checkpoint, history = own, accepted(shaping, own)
    if finished:
        notes.append(f"{result} is gone: it is written again")
    notes.append(f"going on from {checkpoint}" if checkpoint else f"{path} has no checkpoint yet: starting from step 0")
    notes += history
    write_status(path, "running")
    # The new config is written when it trains (`record_config`): until then the run is what it was.
    return RunFolder(path, config, False, run_id, checkpoint, tuple(notes), [*_read_history(path), *history])


def _require_nothing_new(changes: list[ConfigChange], path: Path) -> None:
    """Refuse (ValueError, one line) to change or extend a finished run: its schedule has run out, its result is out."""
    if listing := changes_of_result(changes):
        last = path / "checkpoints" / f"step-{saved_step(path / 'checkpoints'):06d}"
        on = f", to train on from here with run.resume={last} and run.accept_changes" if last.exists() else ""
        raise ValueError(
            f"{path}: the run is finished and cannot be changed or extended: {listing}; restore it, or choose another "
            f"run.name{on}"
        )


def _with_history(config: SFTConfig, history: Sequence[str]) -> bytes:
    """config.yaml: the config, and as comments what it was before."""
    return (to_yaml(config) + "".join(f"# {line}\n" for line in history)).encode()


def _read_history(path: Path) -> tuple[str, ...]:
    lines = (path / "config.yaml").read_text().splitlines()
    return tuple(line.removeprefix("# ") for line in lines if line.startswith(f"# {CHANGED}"))


def _require_shared(run: Run, folder: RunFolder) -> None:
    """Refuse (ValueError) a run.dir that other machines do not see."""
    place, deadline = folder.path / "run_id", time.monotonic() + SHARED_SECONDS
    while not (place.exists() and place.read_text() == folder.run_id) and time.monotonic() < deadline:
        time.sleep(0.5)
    seen = run.gather(place.exists() and place.read_text() == folder.run_id)
    if not all(seen):
        assert run.peers is not None
        raise ValueError(
            f"run.dir: {run.peers.members[seen.index(False)]} does not see {folder.path} as rank 0 does; put run.dir "
            "on a file system that all machines share"
        )


def record_config(run: Run, folder: RunFolder, config: SFTConfig) -> None:
    """Write the config as it was resolved, for whoever reads the folder and for the resumed run.

    The loops call it when the next thing is a step, or the result: a change that trains nothing must not lock the old
    config out.
    """
    if run.is_main:
        write_bytes_atomic(folder.path / "config.yaml", _with_history(config, folder.history))


def _named_checkpoint(config: SFTConfig) -> tuple[Path | None, tuple[str, ...]]:
    """The whole checkpoint that `run.resume` names, if it names one, and in what accepted ways its config differs."""
    if config.run.resume in ("auto", "never"):
        return None, ()
    checkpoint = Path(config.run.resume)
    verify(checkpoint)
    stored = json.loads((checkpoint / "state.json").read_bytes())["config"]
    changes = besides_places(changes_since(stored, config))
    if not config.run.accept_changes:
        require_same_result(changes, checkpoint)
    return checkpoint, accepted(changes, checkpoint)


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        stored = None
    sections = isinstance(stored, dict) and all(isinstance(fields, dict) for fields in stored.values())
    if not sections or not (path / "run_id").is_file():
        raise ValueError(f"run.name: {path} exists and is not the folder of a run; choose another run.name")
    return stored
