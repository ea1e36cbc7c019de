"""Checkpoints: whatever happens while one is written or afterwards, the newest whole one is found, and it is whole."""

import dataclasses
import errno
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qwen_train.config import DataConfig, DPOConfig
from qwen_train.train import checkpoint, files
from qwen_train.train.checkpoint import (
    HARMLESS,
    SaveError,
    clean_leftovers,
    config_changes,
    find_checkpoint,
    finish_save,
    load_checkpoint,
    require_free_space,
    require_same_result,
    save_checkpoint,
    saving,
    verify,
    write_json_atomic,
    write_tensors,
)
from tests.faulty_disk import FaultyDisk, PowerLoss, in_child, no_space


@pytest.fixture
def put_disk(monkeypatch):
    """put_disk(disk): from now on, to the end of the test, files are written through it."""

    def put(disk: files.Disk) -> files.Disk:
        monkeypatch.setattr(files, "disk", disk)
        return disk

    return put


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
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


def equal(left: dict[str, dict[str, torch.Tensor]], right: dict[str, dict[str, torch.Tensor]]) -> bool:
    return left.keys() == right.keys() and all(
        left[stem].keys() == right[stem].keys()
        and all(
            left[stem][name].dtype == tensor.dtype and torch.equal(left[stem][name], tensor)
            for name, tensor in right[stem].items()
        )
        for stem in left
    )


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
    with saving(tmp_path, 7) as temporary:
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
    with pytest.raises(KeyError), saving(tmp_path, 7) as temporary:
        write_tensors(temporary / "adapter.safetensors", {})
        raise KeyError("something of the caller's")
    assert names(tmp_path) == []


# Killed while saving -------------------------------------------------------------------------------------------------


def prepare(folder: Path, existing: tuple[int, ...]) -> None:
    for step in existing:
        save(folder, step)


def num_operations(tmp_path: Path, put_disk, existing: tuple[int, ...], step: int) -> int:
    prepare(tmp_path / "count", existing)
    counter = put_disk(FaultyDisk())
    save(tmp_path / "count", step, keep=1)
    put_disk(files.Disk())
    assert {"make_folder", "create", "write", "sync", "sync_folder", "replace", "remove", "remove_folder"} == {
        *counter.names
    }
    return len(counter.names)


@pytest.mark.parametrize("existing", [(1,), (1, 2)], ids=["new step", "the same step again"])
def test_kill_9_at_every_operation_of_a_save(tmp_path, put_disk, existing):
    total = num_operations(tmp_path, put_disk, existing, step=2)
    found = []
    for at in range(total):
        folder = tmp_path / f"kill{at}"
        prepare(folder, existing)

        def die(folder: Path = folder, at: int = at) -> None:
            put_disk(FaultyDisk(at))
            save(folder, 2, keep=1)

        assert in_child(die) == -signal.SIGKILL
        found.append(assert_one_whole(folder, (*existing, 2)))
        assert_whole(save(folder, 3, keep=1), 3)  # and the run goes on
        assert names(folder) == ["step-000003"]
        shutil.rmtree(folder)
    print(f"{total} kills, {found.count(2)} found the new checkpoint")
    assert found == sorted(found)
    if existing == (1,):
        assert {*found} == {1, 2}


def test_power_loss_at_every_operation_of_a_save(tmp_path, put_disk):
    total = num_operations(tmp_path, put_disk, (1,), step=2)

    def lost(at: int, honest: bool) -> Path:
        folder = tmp_path / f"{honest}{at}"
        prepare(folder, (1,))

        def die() -> None:
            put_disk(PowerLoss(at, honest))
            save(folder, 2, keep=1)

        assert in_child(die) == -signal.SIGKILL
        return folder

    for at in range(total):
        assert_one_whole(lost(at, honest=True), (1, 2))
    # Negative control: on a disk that does not sync, the same order of operations loses everything at some point.
    assert any(find_checkpoint(lost(at, honest=False))[0] is None for at in range(total))


# Disk full -----------------------------------------------------------------------------------------------------------


def test_no_space_at_every_write_leaves_the_previous_checkpoint(tmp_path, put_disk):
    save(tmp_path, 1)
    counter = put_disk(FaultyDisk(only=("write",)))
    save(tmp_path / "count", 2)
    assert len(counter.names) >= 8  # header and tensors of two files, state, manifest
    for at in range(len(counter.names)):
        put_disk(FaultyDisk(at, no_space, only=("write",)))
        with pytest.raises(SaveError, match=r"step-000002: checkpoint not saved, No space left on device") as caught:
            save(tmp_path, 2, keep=1)
        assert caught.value.errno == errno.ENOSPC
        assert "\n" not in str(caught.value) and "run.resume=auto" in str(caught.value)
        assert [name for name in names(tmp_path) if name != "count"] == ["step-000001"]  # nothing half-written stays
        assert_whole(tmp_path / "step-000001", 1)


@pytest.mark.parametrize("existing", [(1,), (1, 2)], ids=["new step", "the same step again"])
def test_an_error_of_any_operation_leaves_a_whole_checkpoint(tmp_path, put_disk, existing, caplog):
    outcomes = set()
    for at in range(num_operations(tmp_path, put_disk, existing, step=2)):
        folder = tmp_path / f"error{at}"
        prepare(folder, existing)
        put_disk(FaultyDisk(at, no_space))
        try:
            save(folder, 2, keep=1)
            outcomes.add("saved")
        except SaveError:
            outcomes.add("refused")
        put_disk(files.Disk())
        assert_one_whole(folder, (*existing, 2))
    assert outcomes == {"saved", "refused"}  # saved: only the deletion of an older one failed, and that was logged
    assert "could not be deleted" in caplog.text


def test_a_disk_that_is_really_full(tmp_path):
    """The same on a tmpfs of 1 MiB, mounted in a namespace of our own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no user namespace to mount a small disk in")
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from qwen_train.train import files
        from qwen_train.train.checkpoint import *
        folder = Path(sys.argv[1])
        save_checkpoint(folder, 1, {"adapter": {"x": torch.ones(1000)}}, {}, 2)
        large = {"adapter": {"x": torch.ones(500_000)}}
        for check in (require_free_space, lambda folder, needed: None):  # told beforehand, and by the disk itself
            import qwen_train.train.checkpoint as module
            module.require_free_space = check
            try:
                save_checkpoint(folder, 2, large, {}, 2)
            except SaveError as error:
                print(error.errno, error)
        print(find_checkpoint(folder), sorted(path.name for path in folder.iterdir()))
    """)
    command = 'mount -t tmpfs -o size=1536k none "$1" && exec "$2" -c "$3" "$1"'
    shell = ["unshare", "-rm", "sh", "-c", command, "sh", str(tmp_path), sys.executable, script]
    result = subprocess.run(shell, capture_output=True, text=True, check=False)
    if "mount" in result.stderr and not result.stdout:
        pytest.skip(f"no small disk can be mounted: {result.stderr.strip()}")
    beforehand, itself, found = result.stdout.splitlines()
    assert beforehand.startswith("28 ") and "too little space left" in beforehand
    assert itself.startswith("28 ") and "No space left on device" in itself
    assert "step-000001'), [])" in found and found.endswith("['step-000001']")


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path):
    require_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ValueError, match=r"not/yet: too little space left, .* needed, .* free; free some") as caught:
        require_free_space(tmp_path / "not" / "yet", 1 << 60)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


# Damaged afterwards --------------------------------------------------------------------------------------------------

FILES = ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path, position: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [truncate, empty, flip, lambda path: flip(path, 0.0), lambda path: flip(path, 1.0), Path.unlink],
    ids=["truncated", "emptied", "flipped", "flipped first", "flipped last", "missing"],
)
def test_damage_to_any_file_is_found_named_and_fallen_back_from(tmp_path, name, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert find_checkpoint(tmp_path) == (newest, [])
    damage(newest / name)
    found, skipped = find_checkpoint(tmp_path)
    assert found == tmp_path / "step-000001"
    assert [path for path, _ in skipped] == [newest] and name in skipped[0][1]
    with pytest.raises(ValueError, match=rf"step-000002: not a whole checkpoint, {name} .*run\.resume=auto") as caught:
        load_checkpoint(newest)
    assert "\n" not in str(caught.value)
    assert_whole(found, 1)


def test_no_byte_of_a_checkpoint_can_change_unseen(tmp_path):
    path = save(tmp_path, 1)
    flips = 0
    for name in FILES:
        whole = (path / name).read_bytes()
        for position in range(len(whole)):
            data = bytearray(whole)
            data[position] ^= 1 << position % 8
            (path / name).write_bytes(data)
            found, skipped = find_checkpoint(tmp_path)
            assert found is None and name in skipped[0][1], (name, position)
            flips += 1
        (path / name).write_bytes(whole)
    assert find_checkpoint(tmp_path) == (path, [])
    print(f"{flips} flips, all seen")


def test_nothing_whole_is_said_of_each(tmp_path):
    assert find_checkpoint(tmp_path / "nothing") == (None, [])
    for path in [save(tmp_path, step) for step in (1, 2)]:
        empty(path / "state.json")
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000004.tmp-0123").mkdir()
    found, skipped = find_checkpoint(tmp_path)
    assert found is None
    assert [path.name for path, _ in skipped] == ["step-000003", "step-000002", "step-000001"]
    assert "manifest.json is missing" in skipped[0][1]


def test_a_renamed_folder_is_not_taken_for_another_step(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step-000009")
    assert "is of step 1" in find_checkpoint(tmp_path)[1][0][1]


def test_a_file_replaced_by_a_link_or_folder_is_refused(tmp_path):
    for make in (lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        path = save(tmp_path, 1)
        (path / "adapter.safetensors").unlink()
        make(path / "adapter.safetensors")
        assert "adapter.safetensors is not a plain file" in find_checkpoint(tmp_path)[1][0][1]
        shutil.rmtree(path)


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


def test_a_planted_pickle_stays_closed(tmp_path, caplog):
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
        with caplog.at_level(logging.WARNING):
            clean_leftovers(folder)
            assert find_checkpoint(folder) == (path, [])
            assert_whole(path, 1)
            save(folder, 2, keep=1)
    finally:
        WATCHING = False
    assert "manifest.json" in OPENED  # the watch works
    assert not {*planted} & {*OPENED}
    assert not marker.exists()
    assert "left closed: .metadata, optimizer.pt" in caplog.text


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
    with pytest.raises(ValueError, match=r"run\.keep: .* got 0; set it to 1 or more"):
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


def test_small_files_are_old_or_new_whatever_happens(tmp_path, put_disk):
    path = tmp_path / "status.json"
    write_json_atomic(path, {"step": 1})
    counter = put_disk(FaultyDisk())
    write_json_atomic(path, {"step": 2})
    assert counter.names == ["create", "write", "sync", "replace", "sync_folder"]
    for at in range(5):
        write_json_atomic(path, {"step": 1})

        def die(at: int = at) -> None:
            put_disk(FaultyDisk(at))
            write_json_atomic(path, {"step": 2})

        put_disk(files.Disk())
        assert in_child(die) == -signal.SIGKILL
        assert json.loads(path.read_text())["step"] == (1 if at < 4 else 2)
        put_disk(FaultyDisk(at, no_space))
        with pytest.raises(OSError, match="No space"):
            write_json_atomic(path, {"step": 3})
        put_disk(files.Disk())
        assert json.loads(path.read_text())["step"] == (3 if at == 4 else 1)
        clean_leftovers(tmp_path)
        assert names(tmp_path) == ["status.json"]


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
    with pytest.raises(ValueError, match=rf"step-000001: .*{field} was .* and is now .*; put back") as caught:
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
