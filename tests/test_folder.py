"""Whose a run's folder is: one process at a time, the same data."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_train.config import DataConfig, RunConfig, SFTConfig
from qwen_train.train.checkpoint import save_checkpoint
from qwen_train.train.folder import RunFolder, open_run
from qwen_train.train.progress import restore
from qwen_train.train.script import _refuse

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
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "cache"), str(tmp_path / "runs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = sorted((tmp_path / "runs/a").iterdir())
        with pytest.raises(ValueError, match=r"run\.name: another process is training in .*/a; wait for it"):
            open_run(config(tmp_path))
        assert sorted((tmp_path / "runs/a").iterdir()) == before
        assert open_run(config(tmp_path, "b")).path.name == "b", "another folder is free"
        holder.kill()
    assert open_run(config(tmp_path)).path.name == "a", "a killed process holds nothing"
    assert open_run(config(tmp_path)).path.name == "a", "and a process does not shut itself out"


@pytest.mark.parametrize("ours", [True, False])
def test_a_folder_is_not_ours_by_its_process_number(tmp_path: Path, ours: bool):
    """In two containers that share runs/ both processes may be number 7: only the one that took it over writes."""
    folder = open_run(config(tmp_path)).path
    status = json.loads((folder / "status.json").read_text())
    assert status["pid"] == os.getpid()
    if not ours:
        (folder / "status.json").write_text(json.dumps({**status, "process": f"elsewhere-{os.getpid()}"}))
    run: Any = SimpleNamespace(is_main=True, close=lambda reason: None)
    with pytest.raises(SystemExit):
        _refuse(run, folder, "refused", "data.train: no such file")
    assert folder.exists() != ours


def test_other_data_are_refused(tmp_path: Path):
    state: dict[str, Any] = {"run_id": "r", "data": "the fingerprint then"}
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 5, {}, state, keep=1)
    folder = RunFolder(tmp_path, config(tmp_path), False, "r", checkpoint, ())
    model: Any = None  # not reached
    with pytest.raises(
        ValueError, match=r"the data are no longer those of the run: .* or the versions of transformers"
    ):
        restore(folder, model, model, "another fingerprint")
