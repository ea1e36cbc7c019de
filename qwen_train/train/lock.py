"""One process at a time in the folder of a run: two would write the same metrics and checkpoints."""

import atexit
import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import IO, NamedTuple

from qwen_train.train.files import make_folder

UNLOCKED = "run.dir: {path} cannot be locked ({reason}): see to it that no other process trains there"


class _Lock(NamedTuple):
    file: IO[str]
    notes: tuple[str, ...]


_LOCKS: dict[Path, _Lock] = {}


class TakenError(ValueError):
    """Another process works in the folder."""


def lock_folder(path: Path) -> tuple[str, ...]:
    """Make this process the only one that works in the run's folder, for as long as it lives; what is to say of it.

    The lock lies beside the folder, where all see it who see the folder. It is of the process (POSIX), so it ends with
    a killed one and its workers do not inherit it. Raises TakenError, and ValueError where nothing can be written.
    """
    place = _place(path)
    while place not in _LOCKS:
        notes: tuple[str, ...] = ()
        try:
            make_folder(place.parent)
            file = open(place, "a")  # noqa: SIM115  # held until the process ends
        except OSError as error:
            if not path.is_dir():
                raise ValueError(f"run.dir: cannot write to {path}: {error.strerror}; choose another run.dir") from None
            return (UNLOCKED.format(path=path, reason=f"{place}: {error.strerror}"),)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise TakenError(
                    f"run.name: another process is training in {path}; wait for it, or choose another run.name"
                ) from None
            notes = (UNLOCKED.format(path=path, reason=f"its file system: {error.strerror}"),)
        if _is_named(file, place):
            _LOCKS[place] = _Lock(file, notes)
            atexit.register(_unlock, place)
        else:  # whoever held it has ended meanwhile
            file.close()
    return _LOCKS[place].notes


def unlock_folder(path: Path) -> None:
    """Let others into a folder that this process has locked."""
    _unlock(_place(path))


def _unlock(place: Path) -> None:
    if lock := _LOCKS.pop(place, None):
        with contextlib.suppress(OSError):  # an empty file that stays holds nobody up
            place.unlink()
        lock.file.close()


def _place(path: Path) -> Path:
    folder = path.resolve()  # one lock by whatever links it is reached
    return folder.parent / f".{folder.name}.lock"


def _is_named(file: IO[str], place: Path) -> bool:
    """Whether an open file still bears its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except OSError:  # deleted; ESTALE if by another machine
        return False
