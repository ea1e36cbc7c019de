"""Verified, atomic checkpoints: a folder counts only if every file has the size and sha256 that its manifest says.

    checkpoints/step-000200.tmp-<uuid>/   model.safetensors, optimizer.safetensors, state.json: written, synced
                                          manifest.json, written last: size and sha256 of each of them
    checkpoints/step-000200/              the same after one rename; then the parent is synced; only then older ones go

Safetensors and JSON only: nothing here can run code, and a file that the manifest does not name is never opened. Resume
takes the newest folder that verifies and says which it skipped and why. With sharded saves several ranks write
their files into the folder of one `saving`, and rank 0 ends it with `finish_save`.
"""

import contextlib
import errno
import hashlib
import json
import logging
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_train.data.digest import file_sha256
from qwen_train.train.blocks import BlockReader
from qwen_train.train.files import (
    FileEntry,
    delete_folder,
    install_folder,
    num_bytes,
    require_free_space,
    stage_folder,
    write_file,
    write_tensors,
)

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
LEFT = "left-"
"""What the names of checkpoints begin with that a run has left behind by going back before them."""
STEP_FOLDER = re.compile(r"step-(?P<step>\d{6,})(\.old-[0-9a-f]{32})?")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|json)")


class SaveError(OSError):
    """A checkpoint could not be written; what was there before is untouched. One line for the user."""


# Saving --------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-<step>` and then delete all but the newest `keep` checkpoints of the same run.

    `tensors`: file stem -> flat tensors by name ({"model": {...}, "optimizer": {...}}). `state`: JSON (`run_id`, the
    config and its history, the number of processes, what `Progress` holds); `step` is added. One process calls this.
    SaveError (an OSError) when the disk refuses: nothing earlier is lost.
    """
    with saving(folder, step, sum(map(num_bytes, tensors.values()))) as temporary:
        entries = {}
        for stem, flat in tensors.items():
            entries[f"{stem}.safetensors"] = write_tensors(temporary / f"{stem}.safetensors", flat)
        return finish_save(temporary, step, entries, state, keep)


def save_error(final: Path, error: OSError) -> SaveError:
    """What is said when the disk refuses the checkpoint `final`."""
    failure = SaveError(
        f"{final}: checkpoint not saved, {error.strerror or error}; earlier checkpoints are untouched: free some "
        "space or point run.dir at another disk, then start again with run.resume=auto"
    )
    failure.errno = error.errno
    return failure


@contextlib.contextmanager
def saving(folder: Path, step: int, needed_bytes: int) -> Iterator[Path]:
    """The temporary folder of one save; removed unless `finish_save` renames it. A refusing disk raises SaveError."""
    final = folder / f"step-{step:06d}"
    temporary = None
    try:
        try:
            require_free_space(folder, needed_bytes + (1 << 20))
        except ValueError as error:
            raise OSError(errno.ENOSPC, str(error)) from None
        temporary = stage_folder(final)
        yield temporary
    except OSError as error:
        raise save_error(final, error) from error
    finally:
        if temporary is not None and temporary.exists():
            try:
                delete_folder(temporary)
            except OSError as error:
                logger.warning("%s: could not be deleted (%s); the next start will", temporary, error)


def finish_save(temporary: Path, step: int, entries: dict[str, FileEntry], state: dict[str, Any], keep: int) -> Path:
    """Write state and manifest, rename the folder to `step-<step>`, sync; only then delete all but the newest `keep`.

    `entries`: file name -> manifest entry of every file that the ranks wrote and synced into `temporary`.
    """
    assert keep > 0, "the new one would go, too"
    text = json.dumps({**state, "step": step}, indent=1).encode()
    manifest = {
        "format": FORMAT,
        "step": step,
        "run_id": state.get("run_id"),
        "files": {**entries, STATE: write_file(temporary / STATE, [text])},
    }
    write_file(temporary / MANIFEST, [_sealed(manifest)])
    final = temporary.with_name(f"step-{step:06d}")
    install_folder(temporary, final)
    _rotate(final, keep)
    return final


def _rotate(newest: Path, keep: int) -> None:
    """Delete checkpoints of the run that just saved `newest`: all but the newest `keep`, and those of later steps.

    Later steps exist only if the run was resumed from an earlier checkpoint: they belong to a course that was left, as
    do those that `set_aside` has renamed. Folders of another run and those without a readable manifest are not touched.
    """
    manifest = _read_manifest(newest)
    kept = 0
    named = [path for path in _step_folders(newest.parent) if not path.suffix]
    for path in [*sorted(named, key=_step_of, reverse=True), *newest.parent.glob(f"{LEFT}*")]:
        try:
            if _read_manifest(path)["run_id"] != manifest["run_id"]:
                continue
        except ValueError:
            continue
        left = path.name.startswith(LEFT) or _step_of(path) > manifest["step"]
        if not left and kept < keep and _shallow_problem(path) is None:
            kept += 1
            continue
        try:
            delete_folder(path)
        except OSError as error:  # the new checkpoint is safe: a folder too many is no reason to stop a run
            logger.warning("%s: an old checkpoint could not be deleted (%s)", path, error)


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the whole checkpoints after `step`, to which a run has gone back: its log is about to be cut there.

    A start after a kill then goes on from `step` as well, and the log has no hole. The newest is renamed first, so that
    the log reaches to the newest that bears its name, whenever the process dies; `_rotate` deletes them.
    """
    own = folder / f"step-{step:06d}"
    aside = []
    for path in sorted(_step_folders(folder) if own.exists() else [], key=_step_of, reverse=True):
        if path.suffix or _step_of(path) <= step or _problem(path) is not None:
            continue
        if _read_manifest(path)["run_id"] == _read_manifest(own)["run_id"]:
            aside.append(path.with_name(path.name.replace("step-", LEFT)))
            install_folder(path, aside[-1])
    return aside


# Finding and loading -------------------------------------------------------------------------------------------------


def find_checkpoint(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and those newer than it that do not, each with the reason."""
    skipped: list[tuple[Path, str]] = []
    for path in sorted(_step_folders(folder), key=lambda path: (_step_of(path), path.suffix == ""), reverse=True):
        reason = _problem(path)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    return None, skipped


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint there, whole or not; 0 without one."""
    return max((_step_of(path) for path in _step_folders(folder)), default=0)


def verify(path: Path) -> None:
    """Refuse (ValueError, naming the file) a checkpoint of which one byte is missing or not as it was written."""
    reason = _problem(path)
    if reason is not None:
        raise ValueError(
            f"{path}: not a whole checkpoint, {reason}; take another one, or run.resume=auto for the newest whole one"
        )


def open_checkpoint(path: Path) -> tuple[BlockReader, dict[str, Any]]:
    """The tensors of a checkpoint, to be read one by one, whole or a part of them, and its state; nothing is verified.

    Opens the files of the manifest and no other.
    """
    try:
        files = _read_manifest(path)["files"]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; it was whole when this run started: start again") from None
    reader = BlockReader(path, [name for name in files if name.endswith(".safetensors")])
    return reader, json.loads((path / STATE).read_bytes())


def strangers(path: Path) -> list[str]:
    """What lies in a whole checkpoint and is not of it, and is never opened."""
    files = _read_manifest(path)["files"]
    return sorted(child.name for child in path.iterdir() if child.name not in files and child.name != MANIFEST)


def _step_folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)] if folder.is_dir() else []


def _step_of(path: Path) -> int:
    match = STEP_FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match["step"])


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest's bytes: fixed form, its own sha256 at the end, so that any changed byte of it shows too."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1, sort_keys=True).encode()).hexdigest()
    return json.dumps({"manifest": manifest, "sha256": digest}, indent=1, sort_keys=True).encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; ValueError with a short reason if it is not as it was written."""
    try:
        raw = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing (the save was not finished)") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    try:
        manifest = json.loads(raw)["manifest"]
        whole = _sealed(manifest) == raw
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST} is damaged ({len(raw)} bytes)")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} is of format {manifest.get('format')!r}, this version reads {FORMAT}")
    for name in manifest["files"]:
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"{MANIFEST} names {name!r}; a checkpoint holds .safetensors and .json files only")
    if STATE not in manifest["files"]:
        raise ValueError(f"{MANIFEST} names no {STATE}")
    return manifest


def _shallow_problem(path: Path) -> str | None:
    """The first missing file or wrong size, without reading the files; None if there is none."""
    try:
        files = _read_manifest(path)["files"]
        for name, entry in files.items():
            status = (path / name).lstat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a plain file"
            if status.st_size != entry["size"]:
                return f"{name} has {status.st_size} bytes instead of {entry['size']}"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None


def _problem(path: Path) -> str | None:
    """The first thing that makes a folder no whole checkpoint, every byte read; None if there is none."""
    reason = _shallow_problem(path)
    if reason is not None:
        return reason
    manifest = _read_manifest(path)
    if STEP_FOLDER.fullmatch(path.name) and manifest["step"] != _step_of(path):
        return f"{MANIFEST} is of step {manifest['step']}: the folder was renamed"
    for name, entry in manifest["files"].items():
        try:
            digest = file_sha256(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if digest != entry["sha256"]:
            return f"{name} is damaged (its sha256 is not the one that was written)"
    return None
