"""A disk that fails, kills the process, or loses power at its n-th operation, to put in the place of `files.disk`."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from qwen_train.train import files


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FaultyDisk(files.Disk):
    """Counts the operations (all, or those named in `only`) and calls `fault` in the place of number `at`.

    A write that is hit has written half of its bytes before.
    """

    def __init__(
        self, at: int | None = None, fault: Callable[[], None] = kill_self, only: tuple[str, ...] = ()
    ) -> None:
        self.at, self.fault, self.only = at, fault, only
        self.names: list[str] = []

    def _next(self, name: str, half: Callable[[], Any] | None = None) -> None:
        if self.only and name not in self.only:
            return
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            if half is not None:
                half()
            self.fault()

    def make_folder(self, path: Path) -> None:
        self._next("make_folder")
        super().make_folder(path)

    def create(self, path: Path) -> BinaryIO:
        self._next("create")
        return super().create(path)

    def write(self, file: BinaryIO, data: memoryview) -> int:
        self._next("write", lambda: super(FaultyDisk, self).write(file, data[: len(data) // 2]))
        return super().write(file, data)

    def sync(self, file: BinaryIO) -> None:
        self._next("sync")
        super().sync(file)

    def sync_folder(self, path: Path) -> None:
        self._next("sync_folder")
        super().sync_folder(path)

    def replace(self, source: Path, target: Path) -> None:
        self._next("replace")
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self._next("remove")
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        self._next("remove_folder")
        super().remove_folder(path)


class PowerLoss(FaultyDisk):
    """Dies like a machine without power: files that were never synced are empty, renames that were not are undone.

    `honest=False`: a disk whose sync of files does nothing (the negative control).
    """

    def __init__(self, at: int | None = None, honest: bool = True) -> None:
        super().__init__(at, self.lose_power)
        self.honest = honest
        self.unsynced: dict[int, int] = {}  # descriptor of the file -> our duplicate of it
        self.renames: list[tuple[Path, Path]] = []

    def lose_power(self) -> None:
        for duplicate in self.unsynced.values():
            os.ftruncate(duplicate, 0)
        for source, target in reversed(self.renames):
            if target.exists() and not source.exists():
                os.rename(target, source)
        kill_self()

    def create(self, path: Path) -> BinaryIO:
        file = super().create(path)
        self.unsynced[file.fileno()] = os.dup(file.fileno())
        return file

    def sync(self, file: BinaryIO) -> None:
        super().sync(file)
        if self.honest:
            os.close(self.unsynced.pop(file.fileno()))
        else:
            self.unsynced[-len(self.unsynced) - 1] = self.unsynced.pop(file.fileno())

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self.renames = [rename for rename in self.renames if rename[1].parent != path]

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.renames.append((source, target))


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked process; returns its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
