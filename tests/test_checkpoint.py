"""Checkpoints: their form, strangers in their folders, rotation, leftovers, changed configs; faults: tests/faults/."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from rich.console import Console

from qwen_train.config import DataConfig, DPOConfig
from qwen_train.train import checkpoint, files
from qwen_train.train.changes import HARMLESS, config_changes, require_same_result
from qwen_train.train.checkpoint import (
    find_checkpoint,
    finish_save,
    open_checkpoint,
    save_checkpoint,
    saving,
    set_aside,
    strangers,
    verify,
)
from qwen_train.train.files import clean_leftovers, write_tensors
from qwen_train.train.metrics import Metrics
from tests.faults.saves import assert_whole, empty, load_checkpoint, names, save, tensors_of, truncate
from tests.faulty_disk import FaultyDisk, in_child

# Round trip ----------------------------------------------------------------------------------------------------------


def test_every_dtype_shape_and_layout_comes_back_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, generator=generator) * 100
    tensors = {str(dtype): values.to(dtype) for dtype in files.SAFETENSORS_NAMES}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": values.T,
        "slice": values[1:4, ::2],
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "a name/with é": torch.ones(1, dtype=torch.bfloat16),
    }
    loaded, state = load_checkpoint(save_checkpoint(tmp_path, 1, {"adapter": tensors}, {}, 1))
    assert loaded["adapter"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = loaded["adapter"][name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert got.reshape(-1).view(torch.uint8).equal(tensor.contiguous().reshape(-1).view(torch.uint8)), name
    assert state == {"step": 1}


def test_the_file_is_the_one_the_safetensors_library_would_read_and_write(tmp_path):
    flat = tensors_of(3)["adapter"]
    write_tensors(tmp_path / "ours.safetensors", flat)
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(flat)
    theirs = safetensors.torch.save(flat, {"format": "pt"})
    assert len(theirs) == (tmp_path / "ours.safetensors").stat().st_size


def test_state_floats_come_back_exactly(tmp_path):
    state = {"loss": 0.1 + 0.2, "lr": 1e-300, "nested": {"beta": [1 / 3, 2**60]}}
    assert load_checkpoint(save_checkpoint(tmp_path, 5, {}, state, 1))[1] == {**state, "step": 5}


def test_several_writers_share_one_folder(tmp_path):
    """The way of sharded saves: every rank writes and syncs its files, one process ends the save."""
    with saving(tmp_path, 7, 0) as temporary:
        entries = {
            f"rank{rank}.safetensors": write_tensors(
                temporary / f"rank{rank}.safetensors", {"x": torch.full((3,), rank)}
            )
            for rank in range(2)
        }
        path = finish_save(temporary, 7, entries, {}, keep=1)
    verify(path)
    assert [load_checkpoint(path)[0][f"rank{rank}"]["x"].tolist() for rank in range(2)] == [[0] * 3, [1] * 3]


def test_a_save_that_is_not_finished_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), saving(tmp_path, 7, 0) as temporary:
        write_tensors(temporary / "adapter.safetensors", {})
        raise KeyError("something of the caller's")
    assert names(tmp_path) == []


# Strangers -----------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


OPENED: list[str] = []
WATCHING = False


def _watch(event: str, arguments: tuple) -> None:
    if WATCHING and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        OPENED.append(os.path.basename(os.fsdecode(arguments[0])))


def test_a_planted_pickle_stays_closed(tmp_path):
    global WATCHING
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists()  # the bomb works
    marker.unlink()
    folder = tmp_path / "checkpoints"
    path = save(folder, 1)
    planted = ["optimizer.pt", "pytorch_model.bin", "random_states_0.pkl", "training_args.bin", ".metadata", "x.json"]
    for name in planted:
        (path / name).write_bytes(bomb)
        (folder / name).write_bytes(bomb)
    sys.addaudithook(_watch)
    WATCHING = True
    try:
        clean_leftovers(folder)
        assert find_checkpoint(folder) == (path, [])
        assert_whole(path, 1)
        assert strangers(path) == sorted(planted)
        save(folder, 2, keep=1)
    finally:
        WATCHING = False
    assert "manifest.json" in OPENED  # the watch works
    assert not {*planted} & {*OPENED}
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "../outside.safetensors", "/etc/passwd.json", ".hidden.json", "a/b.json"]
)
def test_a_manifest_cannot_name_other_kinds_or_other_places(tmp_path, name):
    path = save(tmp_path, 1)
    manifest = checkpoint._read_manifest(path)
    manifest["files"][name] = manifest["files"]["state.json"]
    (path / "manifest.json").write_bytes(checkpoint._sealed(manifest))
    with pytest.raises(ValueError, match=r"holds \.safetensors and \.json files only"):
        load_checkpoint(path)


def test_a_manifest_of_another_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = {**checkpoint._read_manifest(path), "format": 2}
    (path / "manifest.json").write_bytes(checkpoint._sealed(manifest))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        verify(path)


# Rotation ------------------------------------------------------------------------------------------------------------


def test_rotation_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10, 200000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000010", "step-200000"]
    save(tmp_path, 1_200_000, keep=2)
    assert names(tmp_path) == ["step-1200000", "step-200000"]
    assert find_checkpoint(tmp_path)[0] == tmp_path / "step-1200000"
    with pytest.raises(AssertionError, match="the new one would go, too"):
        save(tmp_path, 1_200_001, keep=0)
    assert names(tmp_path) == ["step-1200000", "step-200000"]


def test_rotation_never_deletes_the_last_whole_one(tmp_path):
    """A damaged newer checkpoint does not count as kept: the whole older one stays."""
    save(tmp_path, 1)
    truncate(save(tmp_path, 2) / "adapter.safetensors")
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_rotation_leaves_other_runs_and_unreadable_folders_alone(tmp_path):
    save(tmp_path, 1, run_id="another")
    empty(save(tmp_path, 2) / "manifest.json")
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["notes.txt", "step-000001", "step-000002", "step-000003", "step-000004"]


def test_checkpoints_of_a_course_that_was_left_go_with_the_next_save(tmp_path):
    """Resumed from step 1 by hand, saved at 2: step 3 of the old course must not be the newest any more."""
    for step in (1, 3):
        save(tmp_path, step, keep=3)
    save(tmp_path, 2, keep=3)
    assert find_checkpoint(tmp_path)[0] == tmp_path / "step-000002"
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_run_that_goes_back_leaves_no_hole_in_its_log(tmp_path, monkeypatch):
    """Killed at any moment before its next save, it goes on from where its log ends, or from before."""
    steps = (2, 4, 6, 8)

    def prepare(folder: Path) -> Path:
        for step in steps:
            save(folder / "checkpoints", step, keep=9)
        save(folder / "checkpoints", 5, keep=9, run_id="another")
        (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(9)))
        return folder

    def log_and_checkpoints(folder: Path) -> tuple[int, list[str]]:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n") - 1, names(folder / "checkpoints")

    def go_back(folder: Path) -> None:
        Metrics(folder, 9, 4, is_main=True, console=Console(file=io.StringIO())).close()

    counter = FaultyDisk()
    folder = prepare(tmp_path / "whole")
    monkeypatch.setattr(files, "disk", counter)
    go_back(folder)
    monkeypatch.setattr(files, "disk", files.Disk())
    aside = ["left-000006", "left-000008", "step-000002", "step-000004", "step-000005"]
    assert log_and_checkpoints(folder) == (4, aside)
    assert set_aside(folder / "checkpoints", 4) == [], "the next start finds them out of the way"
    verify(folder / "checkpoints/left-000008")  # until the next save run.resume may name it
    save(folder / "checkpoints", 6, keep=9)
    assert names(folder / "checkpoints") == ["step-000002", "step-000004", "step-000005", "step-000006"]
    assert len(counter.names) > 6
    for at in range(len(counter.names)):
        folder = prepare(tmp_path / f"{at}")

        def die(at: int = at, folder: Path = folder) -> None:
            monkeypatch.setattr(files, "disk", FaultyDisk(at))
            go_back(folder)

        assert in_child(die) == -signal.SIGKILL
        clean_leftovers(folder / "checkpoints")
        last, there = log_and_checkpoints(folder)
        assert max(int(name[5:]) for name in there if name.startswith("step-") and name[5:] != "000005") <= last


def test_a_checkpoint_that_has_gone_meanwhile_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"step-000009: manifest\.json is missing .*; it was whole when this run started"
    ):
        open_checkpoint(tmp_path / "step-000009")


def test_leftovers_are_cleaned_and_an_unfinished_replacement_is_put_back(tmp_path):
    save(tmp_path, 1)
    key = "0" * 32
    shutil.copytree(tmp_path / "step-000001", tmp_path / f"step-000002.tmp-{key}")
    (tmp_path / "step-000001").rename(tmp_path / f"step-000001.old-{key}")
    (tmp_path / f"status.json.tmp-{key}").write_text("{")
    (tmp_path / "step-000003.tmp-notes").mkdir()  # not one of ours
    remarks = clean_leftovers(tmp_path)
    assert len(remarks) == 3 and "step-000001: put back" in remarks[1]
    assert names(tmp_path) == ["step-000001", "step-000003.tmp-notes"]
    assert_whole(tmp_path / "step-000001", 1)


def test_a_new_folder_lasts_and_so_do_those_above_it(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(files.disk, "sync_folder", synced.append)
    for _ in range(2):
        files.make_folder(tmp_path / "runs/a/checkpoints")
    assert synced == [tmp_path, tmp_path / "runs", tmp_path / "runs/a"], "whatever holds a new name, once"


# Resume under a changed config ---------------------------------------------------------------------------------------

CONFIG = {
    "optim": {"lr": 2e-5, "betas": (0.9, 0.999)},
    "run": {"steps": 100, "log_every": 10},
    "data": {"train": ["a.jsonl", {"b.jsonl": 0.5}], "workers": 2},
}


def changed(section: str, **fields) -> dict:
    return {**CONFIG, section: {**CONFIG[section], **fields}}


def test_an_equal_config_has_no_changes_after_a_trip_through_json():
    assert config_changes(json.loads(json.dumps(CONFIG)), CONFIG) == []


@pytest.mark.parametrize(
    ("new", "field", "harmless"),
    [
        (changed("optim", lr=1e-5), "optim.lr", False),
        (changed("optim", betas=[0.9, 0.95]), "optim.betas", False),
        (changed("run", steps=200), "run.steps", False),
        (changed("data", train=["a.jsonl", {"b.jsonl": 0.7}]), "data.train", False),
        (changed("optim", name="sgd"), "optim.name", False),
        (changed("run", log_every=1), "run.log_every", True),
        (changed("data", workers=0), "data.workers", True),
    ],
)
def test_changes_that_shape_the_result_are_refused_in_one_line(new, field, harmless):
    changes = config_changes(CONFIG, new)
    assert [(change.field, change.changes_result) for change in changes] == [(field, not harmless)]
    if harmless:
        require_same_result(changes, Path("step-000001"))
        return
    with pytest.raises(ValueError, match=rf"step-000001: .*{field} was .* and is now .*; restore it") as caught:
        require_same_result(changes, Path("step-000001"))
    assert "\n" not in str(caught.value)


def test_a_removed_field_is_a_change():
    assert [change.field for change in config_changes(CONFIG, {**CONFIG, "run": {"steps": 100}})] == ["run.log_every"]


def test_every_harmless_field_exists():
    """A renamed field would otherwise quietly become one that is refused."""
    config = DPOConfig(data=DataConfig(train="rows.jsonl"))
    fields = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }
    assert fields >= HARMLESS, HARMLESS - fields
