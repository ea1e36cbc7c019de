"""Faults at every operation of a save and in every file of a checkpoint: kill -9, power loss, a full disk, damage.

Each is tried on the three ways a checkpoint is written: in the caller's thread, in the background, by two ranks.
"""

import errno
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_train.train import files
from qwen_train.train.checkpoint import SaveError, find_checkpoint, verify
from qwen_train.train.files import clean_leftovers, require_free_space, write_json_atomic
from tests.faults.saves import WAYS, assert_one_whole, assert_whole, empty, flip, names, save, truncate
from tests.faulty_disk import FaultyDisk, PowerLoss, in_child, no_space

Save = Callable[..., Path]
EXISTING = [
    pytest.param((1,), id="new step"),
    pytest.param((1, 2), id="the same step again", marks=pytest.mark.slow),
]
OPERATIONS = {"make_folder", "create", "write", "sync", "sync_folder", "replace", "remove", "remove_folder"}


# The background thread does what "in place" does, so CI tries that way alone.
@pytest.fixture(params=[pytest.param(way, marks=[pytest.mark.slow] * (way == "in place")) for way in WAYS])
def write(request: pytest.FixtureRequest) -> Save:
    """write(folder, step, keep): one of the ways to save."""
    return WAYS[request.param]


def prepare(folder: Path, existing: tuple[int, ...]) -> None:
    for step in existing:
        save(folder, step)


def num_operations(tmp_path: Path, put_disk, write: Save, existing: tuple[int, ...]) -> int:
    """How often a save of step 2 reaches the disk; it does so in every way there is."""
    prepare(tmp_path / "count", existing)
    counter = put_disk(FaultyDisk())
    write(tmp_path / "count", 2, keep=1)
    put_disk(files.Disk())
    assert {*counter.names} == OPERATIONS
    return len(counter.names)


# Killed while saving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", EXISTING)
def test_kill_9_at_every_operation_of_a_save(tmp_path, put_disk, write, existing, record_property):
    total = num_operations(tmp_path, put_disk, write, existing)
    found = []
    for at in range(total):
        folder = tmp_path / f"kill{at}"
        prepare(folder, existing)

        def die(folder: Path = folder, at: int = at) -> None:
            put_disk(FaultyDisk(at))
            write(folder, 2, keep=1)

        assert in_child(die) == -signal.SIGKILL
        found.append(assert_one_whole(folder, (*existing, 2)))
        assert_whole(write(folder, 3, keep=1), 3)  # and the run goes on
        assert names(folder) == ["step-000003"]
        shutil.rmtree(folder)
    record_property("kills", total)
    assert found == sorted(found)
    if existing == (1,):
        assert {*found} == {1, 2}


def test_power_loss_at_every_operation_of_a_save(tmp_path, put_disk, write, record_property):
    total = num_operations(tmp_path, put_disk, write, (1,))

    def lost(at: int, honest: bool) -> Path:
        folder = tmp_path / f"{honest}{at}"
        prepare(folder, (1,))

        def die() -> None:
            put_disk(PowerLoss(at, honest))
            write(folder, 2, keep=1)

        assert in_child(die) == -signal.SIGKILL
        return folder

    record_property("power losses", total)
    for at in range(total):
        assert_one_whole(lost(at, honest=True), (1, 2))
    # Negative control: on a disk that does not sync, the same order of operations loses everything at some point.
    assert any(find_checkpoint(lost(at, honest=False))[0] is None for at in range(total))


# Disk full -----------------------------------------------------------------------------------------------------------


def test_no_space_at_every_write_leaves_the_previous_checkpoint(tmp_path, put_disk, write, record_property):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    counter = put_disk(FaultyDisk(only=("write",)))
    write(tmp_path / "count", 2)
    assert len(counter.names) >= 8  # header and tensors of two files, state, manifest
    record_property("writes", len(counter.names))
    for at in range(len(counter.names)):
        put_disk(FaultyDisk(at, no_space, only=("write",)))
        with pytest.raises(SaveError, match=r"step-000002: checkpoint not saved, .*No space left on device") as caught:
            write(folder, 2, keep=1)
        assert caught.value.errno == errno.ENOSPC
        assert "\n" not in str(caught.value) and "run.resume=auto" in str(caught.value)
        assert names(folder) == ["step-000001"]  # nothing half-written stays
        assert_whole(folder / "step-000001", 1)


@pytest.mark.parametrize("existing", EXISTING)
def test_an_error_of_any_operation_leaves_a_whole_checkpoint(tmp_path, put_disk, write, existing, caplog):
    outcomes = set()
    for at in range(num_operations(tmp_path, put_disk, write, existing)):
        folder = tmp_path / f"error{at}"
        prepare(folder, existing)
        put_disk(FaultyDisk(at, no_space))
        try:
            write(folder, 2, keep=1)
            outcomes.add("saved")
        except SaveError:
            outcomes.add("refused")
        put_disk(files.Disk())
        assert_one_whole(folder, (*existing, 2))
    assert outcomes == {"saved", "refused"}  # saved: only the deletion of an older one failed, and that was logged
    assert "could not be deleted" in caplog.text


def test_a_disk_that_is_really_full(tmp_path):
    """The same on a tmpfs of 1.5 MiB, mounted in a namespace of our own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no user namespace to mount a small disk in")
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from qwen_train.train import files
        from qwen_train.train.checkpoint import SaveError, find_checkpoint, save_checkpoint
        from qwen_train.train.files import require_free_space
        from qwen_train.train.saver import Saver
        folder = Path(sys.argv[1])
        save_checkpoint(folder, 1, {"adapter": {"x": torch.ones(1000)}}, {}, 2)
        large = {"adapter": {"x": torch.ones(500_000)}}
        for check in (require_free_space, lambda folder, needed: None):  # told beforehand, and by the disk itself
            import qwen_train.train.checkpoint as module
            module.require_free_space = check
            try:
                with Saver(folder, 2, lambda: None) as saver:
                    saver.save(2, large, {})
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


# Damaged afterwards --------------------------------------------------------------------------------------------------


def num_files(write: Save) -> int:
    return {"save_sharded": 6}.get(write.__name__, 4)


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, flip, lambda path: flip(path, 0.0), lambda path: flip(path, 1.0), Path.unlink],
    ids=["truncated", "emptied", "flipped", "flipped first", "flipped last", "missing"],
)
def test_damage_to_any_file_is_found_named_and_fallen_back_from(tmp_path, write, damage):
    files_of_one = names(write(tmp_path / "count", 1))
    assert len(files_of_one) == num_files(write) and "manifest.json" in files_of_one
    for name in files_of_one:
        folder = tmp_path / name.replace(".", "-")
        write(folder, 1)
        newest = write(folder, 2)
        assert find_checkpoint(folder) == (newest, [])
        damage(newest / name)
        found, skipped = find_checkpoint(folder)
        assert found == folder / "step-000001"
        assert [path for path, _ in skipped] == [newest] and name in skipped[0][1]
        message = rf"step-000002: not a whole checkpoint, {name} .*run\.resume=auto"
        with pytest.raises(ValueError, match=message) as caught:
            verify(newest)
        assert "\n" not in str(caught.value)
        assert_whole(found, 1)


@pytest.mark.parametrize("way", ["in place", "sharded"])
def test_no_byte_of_a_checkpoint_can_change_unseen(tmp_path, way, record_property):
    path = WAYS[way](tmp_path, 1)
    flips = 0
    for name in names(path):
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
    record_property("flips", flips)
    assert flips > 1000


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


def test_a_checkpoint_that_is_a_link_goes_without_what_it_leads_to(tmp_path):
    """Somebody has moved it to another disk: rotation, a next save of the step and leftovers take the link alone."""
    folder, archive = tmp_path / "checkpoints", tmp_path / "archive"
    archive.mkdir()
    for step in (1, 2, 3):
        save(folder, step, keep=9).rename(archive / f"{step}")
    (folder / "step-000001").symlink_to(archive / "1")
    (folder / "step-000002").symlink_to(archive / "2")
    (folder / f"step-000003.tmp-{'0' * 32}").symlink_to(archive / "3")
    save(folder, 2, keep=1)  # replaces 2, rotates 1 away
    clean_leftovers(folder)
    assert names(folder) == ["step-000002"] and not (folder / "step-000002").is_symlink()
    for step in (1, 2, 3):
        assert names(archive / f"{step}") == names(folder / "step-000002")
