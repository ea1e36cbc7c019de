"""Files and folders that are either whole or not there: every write of a run goes through the one `disk` below.

A folder is written beside its place as `<name>.tmp-<uuid>`, synced, and renamed; one that stood there before is moved
to `<name>.old-<uuid>` for the moment between two renames. `clean_leftovers` puts right what a killed process left.
Tests replace `disk` by one that fails or dies at the n-th operation.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import torch
from torch import Tensor

from qwen_train.data.scratch import LEFTOVER, beside, sync_folder

logger = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
SAFETENSORS_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class FileEntry(TypedDict):
    """What a manifest says of one file."""

    size: int
    sha256: str


class Disk:
    """The operations by which anything of a run reaches the disk."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> BinaryIO:
        return open(path, "xb", buffering=0)

    def write(self, file: BinaryIO, data: memoryview) -> int:
        return file.write(data)

    def sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        sync_folder(path)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        path.rmdir()


disk = Disk()


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file piece by piece and sync it; returns its size and sha256, both taken on the way."""
    digest, size = hashlib.sha256(), 0
    with disk.create(path) as file:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                digest.update(chunk)
                size += len(chunk)
                write_all(file, chunk)
        disk.sync(file)
    return {"size": size, "sha256": digest.hexdigest()}


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take only a part at a time (on a disk that is nearly full, say)."""
    rest = memoryview(data)
    while rest:
        rest = rest[disk.write(file, rest) :]


def tensor_pieces(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time: never a second copy of all of them in memory.

    `metadata`: texts for its header. Tensors of any device, layout and of the dtypes of `SAFETENSORS_NAMES`; larger
    element sizes come first, which keeps every tensor aligned. Format:
    https://github.com/huggingface/safetensors#format (read back by the library itself).
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
    """Write a safetensors file and sync it; returns its manifest entry."""
    return write_file(path, tensor_pieces(tensors))


def num_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes that the tensors take on disk, headers aside."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace a small file so that a reader, or the next start after a kill, sees the old or the new one, whole."""
    temporary = beside(path)
    try:
        write_file(temporary, [data])
        disk.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    disk.sync_folder(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace a small JSON file atomically; `finite` turns what JSON has no number for into null (ValueError here)."""
    write_bytes_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """The value with every non-finite float in it replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def make_folder(path: Path) -> None:
    """Make a folder that lasts, and those above it, unless it is there."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        disk.sync_folder(path.parent)


def stage_folder(final: Path) -> Path:
    """Make the empty folder `<final>.tmp-<uuid>` that `install_folder` will put in the place of `final`."""
    make_folder(final.parent)
    temporary = beside(final)
    disk.make_folder(temporary)
    return temporary


def install_folder(temporary: Path, final: Path) -> None:
    """Give a finished, synced folder its name, durably; a folder of that name is replaced and only then deleted."""
    disk.sync_folder(temporary)
    previous = None
    if final.exists():
        previous = beside(final, "old")
        disk.replace(final, previous)
    try:
        disk.replace(temporary, final)
    except OSError:
        if previous is not None:
            disk.replace(previous, final)
        raise
    disk.sync_folder(final.parent)
    if previous is not None:
        delete_folder(previous)


def sync_files(folder: Path) -> None:
    """Sync every file below a folder that some library wrote, and the folders."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            disk.sync_folder(path)
        else:
            with open(path, "rb") as file:
                disk.sync(file)
    disk.sync_folder(folder)


@contextlib.contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `final` when the block ends; after an error all is as before."""
    temporary = stage_folder(final)
    try:
        yield temporary
        sync_files(temporary)
        install_folder(temporary, final)
    finally:
        if temporary.exists():
            delete_folder(temporary)


def delete_folder(path: Path) -> None:
    """Delete a folder: renamed first, so that one that was half deleted never bears a valid name.

    Of a link to a folder the link alone: what it leads to is somebody else's.
    """
    if path.is_symlink():
        disk.remove(path)
        return
    doomed = path
    if not LEFTOVER.fullmatch(path.name):
        doomed = beside(path)
        disk.replace(path, doomed)
    for child in sorted(doomed.rglob("*"), reverse=True):  # children before their folder
        if child.is_dir() and not child.is_symlink():
            disk.remove_folder(child)
        else:
            disk.remove(child)
    disk.remove_folder(doomed)


def clean_leftovers(folder: Path) -> list[str]:
    """At the start of a run: put right what a killed process left in a folder; returns one remark each.

    An `.old-` folder whose successor never got its name gets its own back; everything else temporary is deleted. Only
    for a process that owns the run: the temporary folder of a save in progress elsewhere looks the same.
    """
    remarks = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = path.with_name(match["name"])
        if match["kind"] == "old" and not final.exists():
            disk.replace(path, final)
            remarks.append(f"{final}: put back, its replacement was never finished")
        elif path.is_dir():
            delete_folder(path)
            remarks.append(f"{path}: deleted, left by a process that died while writing it")
        else:
            disk.remove(path)
            remarks.append(f"{path}: deleted, left by a process that died while writing it")
    return remarks


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse (ValueError) when the disk of `folder`, which need not exist yet, has fewer than `needed_bytes` free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ValueError(
            f"{folder}: too little space left, {needed_bytes / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free; "
            "free some, lower run.keep, or point run.dir at another disk"
        )
