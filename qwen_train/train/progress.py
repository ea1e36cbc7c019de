"""Where training stands in a run, and that written as a checkpoint and read from one."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import PretrainedConfig

from qwen_train.config import SFTConfig, as_dict
from qwen_train.data.digest import json_sha256
from qwen_train.data.stream import Stream
from qwen_train.data.tokenize import TokenDataset
from qwen_train.model.adapters import adapter_sha256, base_fingerprint
from qwen_train.model.packed import PackedLM, load_trainable, trainable_parameters
from qwen_train.train.changes import history_line
from qwen_train.train.checkpoint import open_checkpoint, saved_step
from qwen_train.train.distributed import Run
from qwen_train.train.folder import RunFolder
from qwen_train.train.optim import load_optimizer_state, optimizer_state, place_masters
from qwen_train.train.saver import Saver
from qwen_train.train.sharding import read_like

NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Fields of a config.json that say who wrote it and how to load it."""
ROWS_TWICE = "with rows that may come twice or never"
WINDOW = 128
"""Steps whose losses and gradient norms a new one is compared with."""
ANSWERS = "answers"
"""How many answers an evaluation draws and how long, beside the splits that they are of."""


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
    """Hash of the token arrays that the steps are cut from (`TokenReport.content`)."""
    order: str = ""
    """Hash of the order of the rows, of the epoch that the next step begins in."""
    start: dict[str, str] = field(default_factory=dict)
    """Fingerprints of what training started from, by the field that names its place."""
    reference: dict[str, Any] = field(default_factory=dict)
    """A few pairs as token ids, and their log-probabilities under the reference (`Reference.prove`)."""
    start_logps: dict[str, float] = field(default_factory=dict)
    """Mean log-probability of the held-out answers at the first evaluation, by side, for losses without a reference."""
    evaluated: int = -1
    """The last step after which held-out data was evaluated; a resumed run makes up for one that was cut short."""
    held_out: dict[str, str] = field(default_factory=dict)
    """What evaluations are of: fingerprints of rows by split, and which answers are drawn (`ANSWERS`)."""
    held_out_since: dict[str, int] = field(default_factory=dict)
    """The step since which that is so, where it has changed: numbers from before are of something else."""

    def hold_out(self, config: SFTConfig, fingerprints: Mapping[str, str]) -> None:
        """Note of what evaluations are from now on. If it was something else before, one is due at once."""
        answers = f"{config.run.eval_samples} of {config.run.eval_sample_tokens} tokens"
        for name, what in {**fingerprints, ANSWERS: answers}.items():
            if self.held_out.setdefault(name, what) != what:
                self.held_out[name], self.held_out_since[name] = what, self.step
                self.evaluated = -1
                if name == "data.eval":
                    self.start_logps = {}

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
    asked = run.is_main and request.is_file()
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
    stream: Stream,
) -> None:
    """Begin a checkpoint of trained weights, optimizer state and progress; the loop waits for a copy of them alone.

    All ranks call it; rank 0 writes. Of a model that is trained in full under FSDP2 each writes its own share. Raises
    ValueError for weights that are not finite.
    """
    require_finite(run, folder, model, saver)
    progress.order = stream.order_digest(progress.step)
    parameters = trainable_parameters(model)
    state = {"run_id": folder.run_id, "world_size": run.world_size, "config": as_dict(config), **asdict(progress)}
    if folder.history:
        state["history"] = folder.history
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model": parameters,
        "optimizer": optimizer_state(optimizer, parameters.items()),
    }
    if run.sharded and not config.lora.enabled:
        saver.save_shard(progress.step, run.own_shard(tensors), state, run)
        return
    whole = {stem: run.whole(flat) for stem, flat in tensors.items()}
    if run.is_main:
        saver.save(progress.step, whole, state)


def require_finite(run: Run, folder: RunFolder, model: PackedLM, saver: Saver | None = None) -> None:
    """Refuse (ValueError) to save or hand over trained weights with a NaN or an infinity."""
    if run.all_finite(trainable_parameters(model).values()):
        return
    if saver is not None:
        saver.wait()  # or the last checkpoint would not be the last
    step = run.from_main(lambda: saved_step(folder.checkpoints))
    left = f"the last checkpoint is step-{step:06d}, start again from it" if step else "there is no checkpoint yet"
    raise ValueError(
        f"{folder.path}: the trained weights hold NaN or infinity, so they are neither saved nor handed over; {left}, "
        f"with a lower optim.lr{' and run.accept_changes' if step else ''}; where losses had been healthy, suspect the "
        "hardware"
    )


def restore(
    run: Run, folder: RunFolder, model: PackedLM, optimizer: Optimizer, data: TokenDataset, stream: Stream
) -> Progress:
    """Weights, optimizer and progress of the checkpoint that the run goes on from; a fresh start if there is none.

    Raises ValueError where the data, their order or the start are others than the checkpoint's (see `accept`).
    """
    content, start = data.report.content, run.from_main(lambda: fingerprint_start(folder))
    if folder.checkpoint is None:
        return Progress(data=content, start=start)
    reader, state = open_checkpoint(folder.checkpoint)
    steps_alike = state["config"]["batch"]["sequences_per_step"] == folder.config.batch.sequences_per_step
    if "order" not in state:
        problem = "it is of an earlier version of this project, and its data cannot be told to be the same"
        accept(run, folder, "the data may be others", problem, ROWS_TWICE)
    elif state["data"] != content:
        problem = "the data are no longer those of the run: data.train, the tokenizer or its template give other tokens"
        accept(run, folder, "the data are others", problem, ROWS_TWICE)
    elif steps_alike and state["order"] != stream.order_digest(state["step"]):
        problem = "the rows no longer come in the order of the run: the weights of data.train, run.seed, numpy or "
        accept(run, folder, "the order of the rows is another", f"{problem}this project's code changed", ROWS_TWICE)
    begun_with = state.get("start", start)
    for name in {**start, **begun_with}:
        if start.get(name) != begun_with.get(name):
            problem = f"{name} is not what the run began with: something else lies there now"
            accept(run, folder, f"{name} is another", problem, "from another start")
    parameters = trainable_parameters(model)
    weights = {name: read_like(reader, "model", name, parameters.get(name)) for name in reader.names("model")}
    entries = {name: parameters.get(name.rpartition("/")[0]) for name in reader.names("optimizer")}
    values = {name: read_like(reader, "optimizer", name, like) for name, like in entries.items()}
    place_masters(parameters, weights, values)
    load_trainable(model, weights)
    load_optimizer_state(optimizer, parameters.items(), values)
    known = {one.name: state[one.name] for one in fields(Progress) if one.name in state}
    progress = Progress(**known | {"data": content, "start": start})
    if folder.checkpoint.parent.resolve() != folder.checkpoints.resolve():
        progress.evaluated = -1  # in another run's folder, whose numbers are not in this one's log
    if state["config"]["batch"]["tokens_per_microbatch"] != folder.config.batch.tokens_per_microbatch:
        progress.tokens_per_microbatch = None  # a new number counts
    return progress


def fingerprint_start(folder: RunFolder) -> dict[str, str]:
    """What training starts from, by the field that names its place: samples of a base's weights, its config.json."""
    model, start = folder.config.model, {}
    path, revision, has_weights = model.path, model.revision, True
    if model.from_scratch:  # of a full model the drawn weights lie in its checkpoints alone
        revision, has_weights = None, folder.config.lora.enabled
        path = str(folder.base) if has_weights else path
    config, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    config = {name: value for name, value in config.items() if name not in NOT_OF_THE_MODEL}
    start["config.json of model.path"] = json_sha256(config)
    if has_weights:
        start["model.path"] = base_fingerprint(path, revision)
    if model.adapter is not None:
        start["model.adapter"] = adapter_sha256(model.adapter)
    return start


def accept(run: Run, folder: RunFolder, change: str, problem: str, how: str) -> None:
    """Add `change` to the history of the run, where `run.accept_changes` lets it pass; otherwise raise ValueError.

    `problem`: what is wrong with the checkpoint; `how` a run goes on that has accepted it.
    """
    assert folder.checkpoint is not None
    problem = f"{folder.checkpoint}: {problem}"
    if not folder.config.run.accept_changes:
        raise ValueError(
            f"{problem}; put that back, start over with another run.name, or set run.accept_changes to go on {how}"
        )
    run.note(f"{problem} (run.accept_changes: going on {how})")
    line = history_line(change, folder.checkpoint)
    if line not in folder.history:
        folder.history.append(line)
