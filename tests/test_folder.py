"""Whose a run's folder is: one process at a time, the same data."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_train.command_line import MADE_UP
from qwen_train.config import DataConfig, RunConfig, SFTConfig
from qwen_train.train import files, folder, lock
from qwen_train.train.checkpoint import save_checkpoint
from qwen_train.train.folder import free_name, open_run
from qwen_train.train.progress import save_asked
from qwen_train.train.script import _refuse
from qwen_train.train.status import write_status
from tests.faulty_disk import FaultyDisk, in_child

HOLDER = """
import sys
from qwen_train.config import DataConfig, RunConfig, SFTConfig
from qwen_train.train.folder import open_run
open_run(SFTConfig(data=DataConfig(train="x", cache_dir=sys.argv[1]), run=RunConfig(name="a", dir=sys.argv[2])))
print("held", flush=True)
sys.stdin.read()
"""


def config(tmp_path: Path, name: str = "a") -> SFTConfig:
    data = DataConfig(train="x", cache_dir=str(tmp_path / "cache"))
    return SFTConfig(data=data, run=RunConfig(name=name, dir=str(tmp_path / "runs")))


@pytest.mark.launch
def test_one_process_in_a_folder(tmp_path: Path):
    """Whatever cache the other uses; a name that is made up is the next free one."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "its own cache"), str(tmp_path / "runs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = sorted((tmp_path / "runs/a").iterdir())
        with pytest.raises(ValueError, match=r"run\.name: another process is training in .*/a; wait for it"):
            open_run(config(tmp_path))
        assert sorted((tmp_path / "runs/a").iterdir()) == before
        (tmp_path / "runs/link").symlink_to("a")
        with pytest.raises(ValueError, match=r"run\.name: another process is training in .*/link; wait for it"):
            open_run(config(tmp_path, "link"))
        assert open_run(config(tmp_path, "b")).path.name == "b", "another folder is free"
        (tmp_path / "runs/a-3").mkdir()
        assert free_name(config(tmp_path)) == "a", "a name that was given is kept"
        MADE_UP.add("a")
        assert [free_name(config(tmp_path)) for _ in range(2)] == ["a-2", "a-2"]
        MADE_UP.remove("a")
        holder.kill()
    assert open_run(config(tmp_path)).path.name == "a", "a killed process holds nothing"
    assert open_run(config(tmp_path)).path.name == "a", "and a process does not shut itself out"


def refuse(path: Path) -> None:
    run: Any = SimpleNamespace(is_main=True, close=lambda reason: None)
    with pytest.raises(SystemExit):
        _refuse(run, path, "refused", "data.train: no such file")


@pytest.mark.parametrize("ours", [True, False])
def test_a_refused_start_takes_back_what_it_has_made_alone(tmp_path: Path, ours: bool):
    """Another process, unseen by a lock, may have begun there meanwhile, or the run may be of an earlier start."""
    path = open_run(config(tmp_path)).path
    (path / "base").mkdir()
    if not ours:
        (path / "run_id").write_text("another's")
    refuse(path)
    assert path.exists() != ours


def test_a_run_that_was_there_is_not_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = open_run(config(tmp_path)).path
    monkeypatch.setattr(folder, "_BEGUN", {})  # as in a process of its own
    refuse(open_run(config(tmp_path)).path)
    assert json.loads((path / "status.json").read_text())["outcome"] == "refused"


@pytest.mark.parametrize("ours", [True, False])
def test_a_folder_is_not_ours_by_its_process_number(tmp_path: Path, ours: bool):
    """In two containers that share runs/ both processes may be number 7: only the one that took it over writes."""
    path = open_run(config(tmp_path)).path
    (path / "metrics.jsonl").touch()  # trained
    status = json.loads((path / "status.json").read_text())
    assert status["pid"] == os.getpid()
    if not ours:
        (path / "status.json").write_text(json.dumps({**status, "process": f"elsewhere-{os.getpid()}"}))
    refuse(path)
    assert json.loads((path / "status.json").read_text())["outcome"] == ("refused" if ours else "running")


def test_a_file_system_without_locks_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    note = r"cannot be locked \(its file system: No locks available\): see to it that no other process trains there"
    assert re.search(note, open_run(config(tmp_path)).notes[0])
    other = tmp_path / "runs/b"

    def too_late(path: Path) -> None:
        other.mkdir()
        (other / "config.yaml").write_text("another's")

    monkeypatch.setattr(folder, "make_folder", lambda path: too_late(path) if path == other else None)
    with pytest.raises(ValueError, match=r"another process has just begun in .*/b; choose another run\.name"):
        open_run(config(tmp_path, "b"))
    assert [path.read_text() for path in other.iterdir()] == ["another's"]


def test_a_folder_that_is_there_is_filled(tmp_path: Path):
    """A link to another disk, or where one is mounted: taken back, it is as empty as before."""
    disk, path = tmp_path / "disk", tmp_path / "runs/a"
    disk.mkdir(), path.parent.mkdir(), path.symlink_to(disk)
    for _ in range(2):
        assert open_run(config(tmp_path)).path == path
        assert path.is_symlink() and sorted(child.name for child in disk.iterdir()) == [
            "config.yaml",
            "run_id",
            "status.json",
        ]
        (path / "base").mkdir()
        refuse(path)
        assert path.is_symlink() and not any(disk.iterdir())
    disk.rmdir()
    with pytest.raises(ValueError, match=r"runs/a is a link to .*/disk, which is not there; make it, or delete the"):
        open_run(config(tmp_path))
    assert path.is_symlink() and not disk.exists()


def test_a_start_that_was_killed_anywhere_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs").mkdir()
    counter = FaultyDisk()
    monkeypatch.setattr(files, "disk", counter)
    open_run(config(tmp_path, "count"))
    monkeypatch.setattr(files, "disk", files.Disk())
    assert counter.names == ["sync_folder", *["create", "write", "sync", "replace", "sync_folder"] * 3]
    for at in range(len(counter.names)):

        def die(at: int = at) -> None:
            monkeypatch.setattr(files, "disk", FaultyDisk(at))
            open_run(config(tmp_path, f"kill-{at}"))

        assert in_child(die) == -signal.SIGKILL
        path = open_run(config(tmp_path, f"kill-{at}")).path
        assert sorted(child.name for child in path.iterdir()) == ["config.yaml", "run_id", "status.json"]
    (tmp_path / "runs/foreign").mkdir()
    (tmp_path / "runs/foreign/status.json").touch()
    with pytest.raises(ValueError, match=r"foreign exists and is not the folder of a run"):
        open_run(config(tmp_path, "foreign"))


def test_the_result_of_a_finished_run_that_is_gone_is_written_again(tmp_path: Path):
    path = open_run(config(tmp_path)).path
    checkpoint = save_checkpoint(path / "checkpoints", 5, {}, {"run_id": "r"}, keep=1)
    (path / "adapter").mkdir()
    write_status(path, "finished", step=5, result="/where/it/was/adapter")
    assert open_run(config(tmp_path)).finished
    (path / "adapter").rmdir()
    again = open_run(config(tmp_path))
    assert not again.finished and again.checkpoint == checkpoint
    assert f"{path / 'adapter'} is gone: it is written again" in again.notes
    (checkpoint / "optimizer.pt").touch()
    assert f"{checkpoint}: not of this checkpoint and left closed: optimizer.pt" in open_run(config(tmp_path)).notes
    write_status(path, "finished", step=5, result="/where/it/was/adapter")
    files.delete_folder(checkpoint)
    with pytest.raises(ValueError, match=r"the run is finished, and .*/adapter and its checkpoints are gone; to train"):
        open_run(config(tmp_path))


def test_a_folder_called_save_asks_for_nothing(tmp_path: Path):
    run: Any = SimpleNamespace(is_main=True, maximum=float)
    opened = open_run(config(tmp_path))
    request = opened.path / "save"
    request.mkdir()
    assert not save_asked(run, opened) and request.is_dir()
    request.rmdir()
    request.touch()
    assert save_asked(run, opened) and not request.exists()
