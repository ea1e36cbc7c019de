"""Small checkpoints for the fault tests: their contents, three ways to write them, and what a next start finds."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qwen_train.train import checkpoint
from qwen_train.train.blocks import Block, Shard
from qwen_train.train.checkpoint import SaveError, find_checkpoint, open_checkpoint, save_checkpoint, verify
from qwen_train.train.files import clean_leftovers
from qwen_train.train.saver import Saver, write_shard

Tensors = dict[str, dict[str, torch.Tensor]]


def tensors_of(step: int) -> Tensors:
    """Contents that differ from step to step."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 6, generator=generator)
    return {
        "adapter": {"a.weight": weight, "b.weight": weight.bfloat16()},
        "optimizer": {"a.exp_avg": weight * 2, "a.step": torch.tensor(float(step))},
    }


def state_of(step: int, run_id: str = "run") -> dict:
    return {"run_id": run_id, "seed": 42, "loss": 0.1 * step, "rows": [step, step + 1]}


def save(folder: Path, step: int, keep: int = 2, run_id: str = "run") -> Path:
    return save_checkpoint(folder, step, tensors_of(step), state_of(step, run_id), keep)


def nothing() -> None:
    """To be done before a background save writes."""


def save_in_background(folder: Path, step: int, keep: int = 2) -> Path:
    with Saver(folder, keep, nothing) as saver:
        saver.save(step, tensors_of(step), state_of(step))
    return folder / f"step-{step:06d}"


def save_sharded(folder: Path, step: int, keep: int = 2) -> Path:
    """Two ranks in one thread: the second does its part when the first asks for word of it, so the order is fixed."""
    words: dict[str, Any] = {}
    shards = [shard_of(tensors_of(step), index) for index in range(2)]

    def second_rank(name: str) -> Any:
        run: Any = SimpleNamespace(is_main=False, rank=1, world_size=2, post=words.__setitem__, posted=words.get)
        try:
            write_shard(folder, step, shards[1], state_of(step), keep, run, "m")
        except SaveError as error:
            assert "step-" in str(error)  # its own; the first rank hears of it and raises another
        return words[name]

    run: Any = SimpleNamespace(is_main=True, rank=0, world_size=2, post=words.__setitem__, posted=second_rank)
    write_shard(folder, step, shards[0], state_of(step), keep, run, "m")
    return folder / f"step-{step:06d}"


def shard_of(tensors: Tensors, index: int) -> Shard:
    """One of two shards along the first dimension; the first has the scalars."""
    blocks: dict[str, dict[str, Block]] = {}
    for stem, flat in tensors.items():
        blocks[stem] = {}
        for name, tensor in flat.items():
            if tensor.ndim:
                half = len(tensor) // 2
                part = tensor[index * half : (index + 1) * half]
                blocks[stem][name] = Block(part, tuple(tensor.shape), (index * half, *[0] * (tensor.ndim - 1)))
            elif index == 0:
                blocks[stem][name] = Block(tensor, (), ())
    return Shard(index, 2, blocks)


WAYS: dict[str, Callable[..., Path]] = {
    "in place": save,
    "in the background": save_in_background,
    "sharded": save_sharded,
}


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[stem].keys() == right[stem].keys()
        and all(
            left[stem][name].dtype == tensor.dtype and torch.equal(left[stem][name], tensor)
            for name, tensor in right[stem].items()
        )
        for stem in left
    )


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """All tensors (file stem -> name -> tensor) and the state of a checkpoint, verified."""
    verify(path)
    reader, state = open_checkpoint(path)
    return {stem: {name: reader.read(stem, name) for name in reader.names(stem)} for stem in reader._stored}, state


def assert_whole(path: Path, step: int) -> None:
    tensors, state = load_checkpoint(path)
    assert state == {**state_of(step), "step": step}
    assert equal(tensors, tensors_of(step))


def assert_one_whole(folder: Path, allowed: tuple[int, ...]) -> int:
    """The next start: whole before and after the leftovers are cleaned; returns the step."""
    before, _ = find_checkpoint(folder)
    assert before is not None
    assert_whole(before, checkpoint._step_of(before))
    clean_leftovers(folder)
    after, _ = find_checkpoint(folder)
    assert after is not None
    step = checkpoint._step_of(after)
    assert step in allowed and step == checkpoint._step_of(before)
    assert_whole(after, step)
    assert not [path for path in folder.iterdir() if ".tmp-" in path.name or ".old-" in path.name]
    return step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path, position: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 0x01
    path.write_bytes(data)
