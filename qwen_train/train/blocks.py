"""Tensors of which several files hold a block each: the files of sharded checkpoints, and reading any part of them.

A rank's file `<stem>-00002-of-00008.safetensors` holds its blocks under the tensors' own names; its metadata says of
each the whole tensor's shape and where the block begins in it. A file without that metadata holds whole tensors. What
is read is cut out of the files by `get_slice`, so a rank reads its own share only, on whatever number of ranks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwen_train.train.files import FileEntry, tensor_pieces, write_file

BLOCKS = "blocks"
SHARD_NAME = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Block:
    """A part of a tensor: its values, the shape of the whole, and where it begins in it (an index for each dim)."""

    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """What one of `count` writers holds: number `index` from 0, its blocks by file stem and name of the tensor.

    A rank whose blocks another replica writes has none. `total_bytes`: of the tensors of all writers together.
    """

    index: int
    count: int
    blocks: Mapping[str, Mapping[str, Block]]
    total_bytes: int = 0

    def file_name(self, stem: str) -> str:
        return f"{stem}-{self.index + 1:05d}-of-{self.count:05d}.safetensors"


def write_blocks(path: Path, blocks: Mapping[str, Block]) -> FileEntry:
    """Write one rank's file and sync it; returns its manifest entry."""
    places = {name: {"shape": block.shape, "offsets": block.offsets} for name, block in blocks.items()}
    tensors = {name: block.tensor for name, block in blocks.items()}
    return write_file(path, tensor_pieces(tensors, {BLOCKS: json.dumps(places, sort_keys=True)}))


@dataclass(frozen=True)
class _Stored:
    """A block in a file."""

    file: Any
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    size: tuple[int, ...]


class BlockReader:
    """The tensors of safetensors files, whole or in blocks; `names` of the files decide which are opened.

    ValueError when the blocks of a tensor contradict each other; what is not covered by blocks shows when it is read.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._stored: dict[str, dict[str, list[_Stored]]] = {}
        self.folder = folder
        for name in names:
            match = SHARD_NAME.fullmatch(name)
            assert match is not None, name
            self._open(folder / name, self._stored.setdefault(match["stem"], {}))

    def _open(self, path: Path, stored: dict[str, list[_Stored]]) -> None:
        file: Any = safe_open(path, "pt")
        places = json.loads((file.metadata() or {}).get(BLOCKS, "{}"))
        for name in file.keys():  # noqa: SIM118  # not a dict
            size = tuple(file.get_slice(name).get_shape())
            place = places.get(name, {"shape": size, "offsets": [0] * len(size)})
            block = _Stored(file, tuple(place["shape"]), tuple(place["offsets"]), size)
            others = stored.setdefault(name, [])
            if others and others[0].shape != block.shape:
                raise ValueError(
                    f"{path}: {name} is part of a tensor of shape {block.shape}, elsewhere {others[0].shape}"
                )
            others.append(block)

    def names(self, stem: str) -> list[str]:
        return list(self._stored.get(stem, {}))

    def shape(self, stem: str, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._stored[stem][name][0].shape

    def read(self, stem: str, name: str, window: Sequence[slice] | None = None) -> Tensor:
        """The tensor, or the part of it that `window` (a slice with bounds for each dim) cuts out; on the CPU."""
        blocks = self._stored[stem][name]
        shape = blocks[0].shape
        if not shape:
            return blocks[0].file.get_tensor(name)
        window = [slice(0, length) for length in shape] if window is None else window
        first = blocks[0].file.get_slice(name)
        out = torch.empty([part.stop - part.start for part in window], dtype=first[:0].dtype)
        missing = out.numel()
        for block in blocks:
            bounds = [
                (max(part.start, offset), min(part.stop, offset + length))
                for part, offset, length in zip(window, block.offsets, block.size, strict=True)
            ]
            if any(low >= high for low, high in bounds):
                continue
            inner = tuple(slice(low - o, high - o) for (low, high), o in zip(bounds, block.offsets, strict=True))
            outer = tuple(slice(low - p.start, high - p.start) for (low, high), p in zip(bounds, window, strict=True))
            out[outer] = block.file.get_slice(name)[inner]
            missing -= out[outer].numel()
        if missing:
            raise ValueError(f"{self.folder}: {missing} elements of {name} are in none of its files")
        return out
