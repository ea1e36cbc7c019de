"""Temporary folders that a killed process cannot leave behind for ever: each is locked by whoever works in it.

The lock (flock on the folder itself) ends with the process and its workers, however they die. Whoever can take the lock
of a temporary folder has found one that nobody works in any more, and deletes it. On a file system without locks
nothing is deleted. So it is in caches, where several processes work; in a run's folder one does, and files.py cleans
up. The names are the same (`beside`).
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

MARK = ".tmp-"
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{32}")
"""The names that `beside` gives."""


def beside(final: Path, kind: Literal["tmp", "old"] = "tmp") -> Path:
    """A name that nobody else has for what is to take the place of `final`, or for what has stood there till now."""
    return final.with_name(f"{final.name}.{kind}-{uuid.uuid4().hex}")


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(final: Path) -> Iterator[Path]:
    """A new, locked folder `<final>.tmp-<id>`, deleted when the block ends; its parents are made where missing."""
    final.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _make(final)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(final: Path) -> tuple[Path, int]:
    while True:
        folder = beside(final)
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # as below
            continue
        with contextlib.suppress(OSError):  # no locks on this file system: then nobody deletes either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # not deleted by another process, which has found it before it was locked
            return folder, lock
        os.close(lock)


def clean_scratch(parent: Path) -> list[Path]:
    """Delete the temporary folders in `parent` that no living process works in; returns them."""
    deleted = []
    for folder in sorted(parent.glob(f"*{MARK}*")):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # gone meanwhile, or not ours to open
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            deleted.append(folder)
        except OSError as error:  # somebody works in it, or it cannot be deleted
            logger.debug("%s: stays, %s", folder, error)
        finally:
            os.close(lock)
    return deleted
