"""Checkpoints written while training goes on: the loop waits for a copy of the tensors, a thread for the disk.

What the thread does is `save_checkpoint`, in its order, so whatever kills the process leaves what it would have left.
There is one save at a time: the next one, and every way out of the `with` block, waits for it. An error of the disk is
raised by the next `check`, `save` or `wait`.
"""

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor

from qwen_train.config import SFTConfig
from qwen_train.model.adapters import can_concatenate, read_adapter_config
from qwen_train.model.memory import Shape
from qwen_train.model.packed import PackedLM, trainable_parameters
from qwen_train.train.blocks import Shard, write_blocks
from qwen_train.train.checkpoint import LEFT, finish_save, save_checkpoint, save_error, saving
from qwen_train.train.distributed import Run
from qwen_train.train.files import FileEntry, require_free_space
from qwen_train.train.signals import Interrupted

logger = logging.getLogger(__name__)

Tensors = dict[str, dict[str, Tensor]]
"""By file stem and name."""

FREE_SHARE = 0.5
"""Share of the free memory that copies may take; a larger state is written from where it lies, and the loop waits."""
CGROUP = Path("/sys/fs/cgroup")


class Saver:
    """Writes one run's checkpoints to `folder`, each after a call of `before_write`, and keeps the newest `keep`."""

    def __init__(self, folder: Path, keep: int, before_write: Callable[[], None]) -> None:
        self.folder = folder
        self.keep = keep
        self.before_write = before_write
        self._copies: Tensors = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._count = 0

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the thread. A save that failed matters more than a signal to leave, less than any other error."""
        try:
            self.wait()
        except Exception as failure:
            if error is None or isinstance(error, Interrupted):
                raise
            logger.warning("%s", failure)

    def save(self, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        """Begin to write `step-<step>`, as `save_checkpoint` does; the tensors may change as soon as this returns.

        Raises SaveError if the save before this one failed.
        """

        def write(held: Tensors) -> None:
            save_checkpoint(self.folder, step, held, state, self.keep)

        self._write(tensors, write, num_processes=1)

    def save_shard(self, step: int, shard: Shard, state: dict[str, Any], run: Run) -> None:
        """`save` on every rank of a sharded run: each writes its own files, rank 0 the rest (see `write_shard`)."""
        self._count += 1
        meeting = f"save-{self._count}"

        def write(held: Tensors) -> None:
            blocks = {
                stem: {name: replace(block, tensor=held[stem][name]) for name, block in flat.items()}
                for stem, flat in shard.blocks.items()
            }
            write_shard(self.folder, step, replace(shard, blocks=blocks), state, self.keep, run, meeting)

        tensors = {stem: {name: block.tensor for name, block in flat.items()} for stem, flat in shard.blocks.items()}
        self._write(tensors, write, run.local_world_size)

    def _write(self, tensors: Tensors, write: Callable[[Tensors], None], num_processes: int) -> None:
        """When the save before this one has ended: `write` with copies, in the thread; with the tensors, at once, where
        copies leave `num_processes` on this machine too little memory."""
        self.wait()
        if not _fits(tensors, self._copies, num_processes):
            self.before_write()
            write(tensors)
            return
        self._copies, ready = copied(tensors, self._copies)

        def work() -> None:
            try:
                self.before_write()
                ready()
                write(self._copies)
            except BaseException as error:  # raised again by wait()
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what a save that has ended failed with; does not wait for one that has not."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the save in progress, if any, is on the disk. Raises SaveError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def write_shard(
    folder: Path, step: int, shard: Shard, state: dict[str, Any], keep: int, run: Run, meeting: str
) -> None:
    """One rank's part in a save: rank 0 makes the folder and, when all have written, the manifest and the name.

    The ranks talk by `run.post` under names that begin with `meeting`, one for each save: collectives belong to the
    loop's thread. Raises SaveError on a rank whose disk refuses, and on rank 0 whichever it was.
    """
    if run.is_main:
        begun = False
        try:
            with saving(folder, step, shard.total_bytes) as temporary:
                run.post(f"{meeting}/folder", temporary.name)
                begun = True
                entries, error = _write_files(temporary, shard)
                for rank in range(1, run.world_size):
                    others, problem = run.posted(f"{meeting}/{rank}")
                    entries |= others
                    if problem is not None and error is None:
                        error = OSError(problem[0], f"rank {rank}: {problem[1]}")
                if error is not None:
                    raise error
                finish_save(temporary, step, entries, state, keep)
        finally:
            if not begun:
                run.post(f"{meeting}/folder", None)
            run.post(f"{meeting}/end", None)
        return
    name = run.posted(f"{meeting}/folder")
    if name is None:  # rank 0 has met a problem, and says so
        return
    entries, error = _write_files(folder / name, shard)
    run.post(f"{meeting}/{run.rank}", (entries, error and (error.errno, error.strerror or str(error))))
    run.posted(f"{meeting}/end")
    if error is not None:
        raise save_error(folder / f"step-{step:06d}", error)


def _write_files(folder: Path, shard: Shard) -> tuple[dict[str, FileEntry], OSError | None]:
    """Write this rank's files; the manifest's entries for them, and what the disk had against it."""
    entries: dict[str, FileEntry] = {}
    try:
        for stem, blocks in shard.blocks.items():
            if blocks:
                entries[shard.file_name(stem)] = write_blocks(folder / shard.file_name(stem), blocks)
    except OSError as error:
        return entries, error
    return entries, None


def _fits(tensors: Tensors, held: Tensors, num_processes: int) -> bool:
    """Whether copies, into the buffers of `held` where there are some, leave enough memory to all who make them."""
    return num_processes * (_buffer_bytes(tensors) - _buffer_bytes(held)) <= FREE_SHARE * available_memory()


def _buffer_bytes(tensors: Tensors) -> int:
    """Of copies in page-locked memory, which are rounded up to powers of two."""
    return sum(_power_of_two(tensor.nbytes) for flat in tensors.values() for tensor in flat.values())


def available_memory() -> int:
    """Bytes of memory free on this machine, or in this container (cgroup v2) where that is less."""
    available = int(psutil.virtual_memory().available)
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(counts["inactive_file"])  # a cache: given back
        available = min(available, int(most) - used)
    return available


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 1 else size


def require_room(folder: Path, model: PackedLM, config: SFTConfig, steps_left: int) -> None:
    """Before the first step: refuse (ValueError) a disk that will not hold the checkpoints and the result to come.

    Checkpoints: weights and optimizer state, `run.keep` of them and the one being written, fewer in a short run, less
    those that are there already. Result: the adapter, the model, or after a merged start both: this run's part and what
    it is joined to, an adapter of both ranks or, where they cannot be one adapter, a merged model.
    """
    parameters = trainable_parameters(model).values()
    one = sum(p.numel() * (p.element_size() + _state_bytes(p, config.optim.name)) for p in parameters)
    saves = math.ceil(steps_left / config.run.save_every) if config.run.save_every else 1
    there = len([*folder.glob("step-*"), *folder.glob(f"{LEFT}*")])
    missing = max(min(there + saves, config.run.keep + 1) - there, 1)
    itemsize = getattr(torch, config.model.dtype).itemsize
    if config.lora.enabled:
        adapter = result = sum(parameter.nbytes for parameter in parameters)
        if config.model.merges:
            start = config.model.adapter or ""
            if can_concatenate(start, config.lora):
                result += adapter + math.ceil(adapter * read_adapter_config(start).r / config.lora.r)
            else:
                result += Shape.of(model.causal_lm.config).parameters * itemsize
    else:
        result = sum(p.numel() for p in parameters) * itemsize
    require_free_space(folder, missing * one + result)


def _state_bytes(parameter: Tensor, optimizer: str) -> int:
    """Bytes of optimizer state for each element: two moments in fp32 or 8 bits, an fp32 master beside a bf16 weight."""
    return (2 if optimizer == "adamw_8bit" else 8) + (0 if parameter.dtype == torch.float32 else 4)


def copied(tensors: Tensors, old: Tensors) -> tuple[Tensors, Callable[[], None]]:
    """Copies in (page-locked) host memory, in the buffers of `old` where they fit, and what waits until they are whole.

    Copies from a GPU run in its stream's order, before whatever the loop does next to the tensors, so the host need not
    wait for them here.
    """
    copies: Tensors = {}
    for stem, flat in tensors.items():
        copies[stem] = {}
        for name, tensor in flat.items():
            buffer = old.get(stem, {}).get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[stem][name] = buffer.copy_(tensor.detach(), non_blocking=True)
    if not any(tensor.is_cuda for flat in tensors.values() for tensor in flat.values()):
        return copies, lambda: None
    done = torch.cuda.Event()
    done.record()
    return copies, done.synchronize
