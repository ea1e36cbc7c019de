"""The folder of a run: whose it is, where training stands in it, how it ended."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils.logging import disable_progress_bar

from qwen_train.config import TIMED_NAME, Config, SFTConfig, as_dict, print_errors, refuse_alike, to_yaml
from qwen_train.data.stream import worker_death
from qwen_train.model.packed import PackedLM, load_trainable, trainable_parameters
from qwen_train.train.checkpoint import (
    STEP_FOLDER,
    ConfigChange,
    SaveError,
    config_changes,
    find_checkpoint,
    open_checkpoint,
    require_same_result,
    verify,
)
from qwen_train.train.distributed import START_INTERRUPTED, Interrupted, Run
from qwen_train.train.files import (
    clean_leftovers,
    delete_folder,
    replacing_folder,
    write_bytes_atomic,
    write_file,
)
from qwen_train.train.metrics import this_process, write_status
from qwen_train.train.optim import load_optimizer_state, optimizer_state
from qwen_train.train.peers import Departure
from qwen_train.train.saver import Saver
from qwen_train.train.sharding import read_like

SHARED_SECONDS = 30.0  # that a network file system may take to show a new file

OWN_FIELDS = (("run", "name"), ("data", "cache_dir"), ("data", "workers"))
"""What ranks may differ in: a name that is made up from the time (rank 0's counts), and how each makes its batches."""

logger = logging.getLogger(__name__)

CHANGED = "changed "
"""How a line of a run's history begins."""
_LOCKS: dict[Path, IO[str]] = {}


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
    history: tuple[str, ...] = ()
    """Changes of the config on the way that shaped the result, a line each (`run.accept_changes`)."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def base(self) -> Path:
        """The base weights of a `from_scratch` run."""
        return self.path / "base"


def open_run(config: SFTConfig) -> RunFolder:
    """The folder of `config`'s run, made or found again, and marked as running. Rank 0 only.

    Raises ValueError for a folder that is not this run's, which is left as it is.
    """
    assert config.run.name is not None
    path = Path(config.run.dir) / config.run.name
    _lock(path, config.data.cache_dir)
    if config.run.resume not in ("auto", "never") and not Path(config.run.resume).is_dir():
        raise ValueError(
            f"run.resume: {config.run.resume} is not a checkpoint folder; give one, or auto for the newest, or never"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"run.name: {path} is a file; choose another run.name or run.dir")
    is_new = not path.exists() or not any(path.iterdir())
    if not is_new and config.run.resume == "never":
        raise ValueError(f"run.resume: never, but {path} holds a run already; delete it or choose another run.name")
    return _begin(config, path) if is_new else _continue(config, path)


def _lock(path: Path, cache_dir: str) -> None:
    """Make this process the only one on this machine that works in the run's folder, for as long as it lives.

    Two would write the same metrics and checkpoints. The lock lies in the cache, so that a refused run leaves nothing
    behind; it is of the process (POSIX), so it ends with a killed one and its workers do not inherit it.
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    file = Path(cache_dir).expanduser() / "locks" / name
    if file in _LOCKS:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _LOCKS[file] = open(file, "a")  # noqa: SIM115  # held until the process ends
        fcntl.lockf(_LOCKS[file], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        _LOCKS.pop(file, None)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f"run.name: another process is training in {path}; wait for it, or choose another run.name"
            ) from None
        raise ValueError(f"data.cache_dir: cannot write to {file.parent}: {error.strerror}; choose another") from None


def _begin(config: SFTConfig, path: Path) -> RunFolder:
    checkpoint, history = _named_checkpoint(config)
    run_id = uuid.uuid4().hex
    try:
        with replacing_folder(path) as temporary:
            write_file(temporary / "config.yaml", [_with_history(config, history)])
            write_file(temporary / "run_id", [run_id.encode()])
            write_status(temporary, "running")
    except OSError as error:
        raise ValueError(f"run.dir: cannot write to {path}: {error.strerror}; choose another run.dir") from None
    return RunFolder(path, config, False, run_id, checkpoint, history, history)


def _continue(config: SFTConfig, path: Path) -> RunFolder:
    stored = _stored_config(path)
    config = _with_resolved(config, stored)
    changes = config_changes(stored, as_dict(config))
    if not config.run.accept_changes:
        require_same_result(changes, path)
    notes = [f"{change.field}: {change.old} -> {change.new}" for change in changes]
    run_id = (path / "run_id").read_text()
    if _outcome(path) == "finished":
        return RunFolder(path, config, True, run_id, None, tuple(notes))
    notes += clean_leftovers(path) + clean_leftovers(path / "checkpoints")
    checkpoint, history = _named_checkpoint(config)
    checkpoints = path / "checkpoints"
    if checkpoint is None or checkpoint.resolve().parent != checkpoints.resolve():
        # One of another run is where this one began: the same command, run again, must not throw away what it has done.
        own, skipped = find_checkpoint(checkpoints)
        if own is None and skipped:
            reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in skipped)
            raise ValueError(
                f"run.resume: no checkpoint in {checkpoints} is whole ({reasons}); see to the disk, or to start anew "
                "delete them or choose another run.name"
            )
        notes += [f"{folder}: skipped, {reason}" for folder, reason in skipped]
        if checkpoint is None or own is not None:
            checkpoint, history = own, _accepted(changes, own)
    notes.append(f"going on from {checkpoint}" if checkpoint else f"{path} has no checkpoint yet: starting anew")
    notes += history
    history = (*_read_history(path), *history)
    write_bytes_atomic(path / "config.yaml", _with_history(config, history))
    write_status(path, "running")
    return RunFolder(path, config, False, run_id, checkpoint, tuple(notes), history)


def _accepted(changes: list[ConfigChange], checkpoint: Path | None) -> tuple[str, ...]:
    """What `run.accept_changes` let pass, a line each."""
    place = f"after {checkpoint.name}" if checkpoint else "before any checkpoint"
    return tuple(
        f"{CHANGED}{place}: {change.field} was {change.old!r} and is now {change.new!r}"
        for change in changes
        if change.changes_result
    )


def _with_history(config: SFTConfig, history: tuple[str, ...]) -> bytes:
    """config.yaml: the config, and as comments what it was before."""
    return (to_yaml(config) + "".join(f"# {line}\n" for line in history)).encode()


def _read_history(path: Path) -> tuple[str, ...]:
    lines = (path / "config.yaml").read_text().splitlines()
    return tuple(line.removeprefix("# ") for line in lines if line.startswith(f"# {CHANGED}"))


def require_shared(run: Run, folder: RunFolder) -> None:
    """Refuse (ValueError) a run.dir that other machines do not see, where they have to read or write checkpoints."""
    if run.world_size == 1 or not (run.sharded or folder.checkpoint):
        return
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
    """Write the config as it was resolved, for whoever reads the folder and for the resumed run."""
    if run.is_main:
        write_bytes_atomic(folder.path / "config.yaml", _with_history(config, folder.history))


def _named_checkpoint(config: SFTConfig) -> tuple[Path | None, tuple[str, ...]]:
    """The whole checkpoint that `run.resume` names, if it names one, and in what accepted ways its config differs."""
    if config.run.resume in ("auto", "never"):
        return None, ()
    checkpoint = Path(config.run.resume)
    verify(checkpoint)
    stored = json.loads((checkpoint / "state.json").read_bytes())["config"]
    changes = config_changes(stored, as_dict(config))
    if not config.run.accept_changes:
        require_same_result(changes, checkpoint)
    return checkpoint, _accepted(changes, checkpoint)


def _with_resolved(config: SFTConfig, stored: dict[str, Any]) -> SFTConfig:
    """`config` with the numbers that its `auto` values were given when the run began."""
    for section, old in stored.items():
        values: Any = getattr(config, section, None)
        numbers = {
            name: value
            for name, value in old.items()
            if isinstance(value, int) and getattr(values, name, None) == "auto"
        }
        if numbers:
            changed: dict[str, Any] = {section: dataclasses.replace(values, **numbers)}
            config = dataclasses.replace(config, **changed)
    return config


def _status(path: Path) -> dict[str, Any]:
    try:
        status = json.loads((path / "status.json").read_text())
    except (OSError, ValueError):
        return {}  # none, or not ours: as good as interrupted
    return status if isinstance(status, dict) else {}


def _outcome(path: Path) -> Any:
    return _status(path).get("outcome")


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        stored = None
    sections = isinstance(stored, dict) and all(isinstance(fields, dict) for fields in stored.values())
    if not sections or not (path / "run_id").is_file():
        raise ValueError(f"run.name: {path} exists and is not the folder of a run; choose another run.name")
    return stored


# ---------------------------------------------------------------------------------------------------------------------
# Where training stands


WINDOW = 128
"""Steps whose losses and gradient norms a new one is compared with."""


@dataclass
class Progress:
    """What changes from step to step beside weights and optimizer."""

    step: int = 0
    """Finished optimizer steps."""
    num_tokens: int = 0
    """Tokens trained on, of all ranks."""
    skipped: int = 0
    """Steps whose update was skipped: their loss or gradient was not finite, or a spike."""
    skipped_in_a_row: int = 0
    """Of those, the last ones without an update between them."""
    losses: list[float] = field(default_factory=list)
    """Finite losses of the last steps, which a spike is judged by."""
    grad_norms: list[float] = field(default_factory=list)
    """Likewise the gradient norms."""
    oom_retries: int = 0
    """Times that a step was done again in smaller micro-batches, since memory had run out."""
    tokens_per_microbatch: int | None = None
    """The token budget since the last of those; None: the config's."""
    data: str = ""
    """Fingerprint of the token arrays that the steps are cut from."""
    start_logps: dict[str, float] = field(default_factory=dict)
    """Mean log-probability of the held-out answers at the first evaluation, by side, for losses without a reference."""
    evaluated: int = -1
    """The last step after which held-out data was evaluated; a resumed run makes up for one that was cut short."""

    def remember(self, loss: float, grad_norm: float) -> None:
        """Let a step's loss and gradient norm, where they are finite, be among those that later ones are judged by."""
        for value, window in ((loss, self.losses), (grad_norm, self.grad_norms)):
            if math.isfinite(value):
                window.append(value)
            del window[:-WINDOW]


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def save_asked(run: Run, folder: RunFolder) -> bool:
    """Whether somebody has put a file `save` into the run's folder; it is taken away. All ranks hear the same."""
    request = folder.path / "save"
    asked = run.is_main and request.exists()
    if asked:
        request.unlink(missing_ok=True)
    return run.maximum(float(asked)) > 0


def save(
    run: Run,
    folder: RunFolder,
    progress: Progress,
    model: PackedLM,
    optimizer: Optimizer,
    config: SFTConfig,
    saver: Saver,
    before_write: Callable[[], None],
) -> None:
    """Begin a checkpoint of trained weights, optimizer state and progress; the loop waits for a copy of them alone.

    All ranks call it; rank 0 writes, after `before_write()`. Of a model that is trained in full under FSDP2 each writes
    its own share.
    """
    parameters = trainable_parameters(model)
    state = {"run_id": folder.run_id, "world_size": run.world_size, "config": as_dict(config), **asdict(progress)}
    if folder.history:
        state["history"] = folder.history
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model": parameters,
        "optimizer": optimizer_state(optimizer, parameters.items()),
    }
    if run.sharded and not config.lora.enabled:
        saver.save_shard(progress.step, run.own_shard(tensors), state, run, before_write)
        return
    whole = {stem: run.whole(flat) for stem, flat in tensors.items()}
    if run.is_main:
        saver.save(progress.step, whole, state, before_write)


def restore(folder: RunFolder, model: PackedLM, optimizer: Optimizer, data: str) -> Progress:
    """Weights, optimizer and progress of the checkpoint that the run goes on from; a fresh start if there is none.

    `data`: fingerprint of the token arrays. Raises ValueError if it is not the checkpoint's, since rows would then be
    trained twice or never (unless `run.accept_changes`).
    """
    if folder.checkpoint is None:
        return Progress(data=data)
    reader, state = open_checkpoint(folder.checkpoint)
    if state["data"] != data:
        changed = (
            f"{folder.checkpoint}: the data are no longer those of the run: files of data.train, the tokenizer, its "
            "template or the code that reads them have changed"
        )
        if not folder.config.run.accept_changes:
            raise ValueError(
                f"{changed}; put them back, start anew with another run.name, or set run.accept_changes to go on with "
                "rows that may come twice or never"
            )
        logger.warning("%s (run.accept_changes: going on)", changed)
    parameters = trainable_parameters(model)
    weights = {name: read_like(reader, "model", name, parameters.get(name)) for name in reader.names("model")}
    load_trainable(model, weights)
    entries = {name: parameters.get(name.rpartition("/")[0]) for name in reader.names("optimizer")}
    values = {name: read_like(reader, "optimizer", name, like) for name, like in entries.items()}
    load_optimizer_state(optimizer, parameters.items(), values)
    progress = Progress(**{**{known.name: state[known.name] for known in fields(Progress)}, "data": data})
    if state["config"]["batch"]["tokens_per_microbatch"] != folder.config.batch.tokens_per_microbatch:
        progress.tokens_per_microbatch = None  # a number that is given anew counts
    return progress


# ---------------------------------------------------------------------------------------------------------------------
# The frame of a script


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
    folder = Path(config.run.dir) / config.run.name
    if run.is_main:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    if run.peers is not None:
        run.peers.when_gone(lambda departure: os._exit(_follow(run, folder, config.run.name, departure)))
    try:
        require_one_config(run, config)
        train(config, run)
    except BaseException as error:
        early = run.stop_signal is not None and not run.is_training
        run.begin()  # from here on a signal is only noted: the way out is taken already
        departure = run.departure(error, early)
        if departure is not None and not (early and departure.reason):
            sys.exit(_follow(run, folder, config.run.name, departure))
        # Libraries that a signal cuts short before training clean up with errors of their own.
        cause = Interrupted(START_INTERRUPTED) if early else error
        if isinstance(cause, Interrupted):
            reason = f"{cause}{run.asked_elsewhere}; {_how_to_go_on(config.run.name)}"
            run.note(reason)
            _report(run, folder, "interrupted", reason)
            run.close(reason if early else "")  # in training all ranks leave together
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


def _follow(run: Run, folder: Path, name: str | None, departure: Departure) -> int:
    """Report that another rank has gone, without which this one cannot go on; the exit code.

    The first rank that is left of each machine says so; not beside one that has said itself why it leaves.
    """
    assert run.peers is not None and name is not None
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
    untrained = not (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").exists()
    if run.is_main and untrained and _is_ours(folder):
        delete_folder(folder)
    else:
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
    if run.is_main and _is_ours(folder):
        try:
            write_status(folder, outcome, reason, step=_saved_step(folder))
        except OSError as error:  # the disk is full, say: the way out goes on
            print_errors(f"{folder / 'status.json'}: not written, {error.strerror}")


def _how_to_go_on(name: str) -> str:
    """What resumes the run: the same command, which makes up another name where it gave none."""
    return f"go on with --run.name {name}" if TIMED_NAME.fullmatch(name) else "start again to go on"


def _saved_step(folder: Path) -> int:
    """The step of the newest checkpoint in a run's folder; 0 without one."""
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    return max((int(match["step"]) for name in names if (match := STEP_FOLDER.fullmatch(name))), default=0)


def _is_ours(folder: Path) -> bool:
    return _status(folder).get("process") == this_process()


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
        return f"{error.filename}: {error.strerror}; see to the path and its permissions"
    return None


def _memory_problem(error: torch.OutOfMemoryError) -> str:
    """Where a step could not be done again in smaller micro-batches: an update, an evaluation, a reference's scores."""
    what = str(error).split(". GPU")[0].splitlines()[0]
    return (
        f"batch.tokens_per_microbatch: out of memory outside of a step's micro-batches ({what}); lower it, "
        "run.eval_samples or data.max_length, or use model.quantization nf4 or FSDP2"
    )
