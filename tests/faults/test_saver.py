"""Saves in the background: what the loop waits for, what reaches the disk, how an error comes out."""

import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen_train.train import files, saver
from qwen_train.train.checkpoint import SaveError, find_checkpoint, save_checkpoint
from qwen_train.train.saver import Saver
from qwen_train.train.signals import Interrupted
from tests.faults.saves import load_checkpoint, nothing
from tests.faulty_disk import FaultyDisk, no_space

STATE = {"run_id": "run"}


class SlowDisk(files.Disk):
    """Every write and every sync takes a while, and no two of them are of different threads at once."""

    def __init__(self, seconds: float = 0.03) -> None:
        self.seconds = seconds
        self.threads: set[threading.Thread] = set()

    def write(self, file, data):
        self.threads.add(threading.current_thread())
        time.sleep(self.seconds)
        return super().write(file, data)

    def sync(self, file):
        time.sleep(self.seconds)
        super().sync(file)


@pytest.fixture
def slow_disk(monkeypatch) -> SlowDisk:
    disk = SlowDisk()
    monkeypatch.setattr(files, "disk", disk)
    return disk


def tensors(value: float = 1.0, elements: int = 200_000) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(int(value))
    return {
        "model": {f"w{i}": torch.randn(elements, generator=generator) + value for i in range(5)},
        "optimizer": {"w0/step": torch.tensor(value), "w0/exp_avg": torch.randn(elements, generator=generator)},
    }


def waited_and_written(folder: Path, step: int) -> tuple[float, float]:
    """Seconds that a save keeps the loop, and seconds until it is on the disk."""
    with Saver(folder, 1, nothing) as saving:
        start = time.monotonic()
        saving.save(step, tensors(), STATE)
        waited = time.monotonic() - start
        saving.wait()
        return waited, time.monotonic() - start


def test_the_loop_waits_for_the_copy_alone(tmp_path, slow_disk, monkeypatch, record_property):
    waited, written = waited_and_written(tmp_path, 1)
    record_property("seconds", f"{waited:.4f} of {written:.4f}")
    assert written > 10 * slow_disk.seconds and waited < written / 4
    # Negative control: where copies do not fit into memory, the save is written in place, and the loop waits for all.
    monkeypatch.setattr(saver, "FREE_SHARE", 0.0)
    waited, written = waited_and_written(tmp_path, 2)
    record_property("seconds in place", f"{waited:.4f} of {written:.4f}")
    assert written > 10 * slow_disk.seconds and waited > 0.9 * written
    assert load_checkpoint(tmp_path / "step-000002")[1]["step"] == 2


def test_memory_is_that_of_the_container_of_all_who_save_and_of_buffers_there_are(tmp_path, monkeypatch):
    needed = saver._buffer_bytes(tensors())
    free = int(2.1 * needed)
    monkeypatch.setattr(saver, "CGROUP", tmp_path)
    monkeypatch.setattr(saver.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert saver._fits(tensors(), {}, 1) and not saver._fits(tensors(), {}, 2)
    with Saver(tmp_path / "checkpoints", 1, nothing) as saving:
        for step in (1, 2):  # the second time the buffers are what is missing
            saving.save(step, tensors(), STATE)
            assert saving._thread is not None
            saving.wait()
            free = int(1.1 * needed)
    free = int(2.1 * needed)
    (tmp_path / "memory.current").write_text(f"{needed}\n")
    for most, cached, fits in (
        ("max", 0, True),
        (3 * needed, 0, True),
        (2 * needed, 0, False),
        (2 * needed, needed, True),
        (9 * needed, 0, True),
    ):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
        assert saver._fits(tensors(), {}, 1) == fits, (most, cached)


def test_what_is_written_is_what_was_there_when_the_save_began(tmp_path, slow_disk, monkeypatch):
    def saved_while_training_goes_on(step: int) -> bool:
        live, expected = tensors(), tensors()
        with Saver(tmp_path, 1, nothing) as saving:
            saving.save(step, live, STATE)
            for flat in live.values():
                for tensor in flat.values():
                    tensor.add_(1)  # the next step
        loaded, _ = load_checkpoint(tmp_path / f"step-{step:06d}")
        return all(
            torch.equal(loaded[stem][name], tensor) for stem, flat in expected.items() for name, tensor in flat.items()
        )

    assert saved_while_training_goes_on(1)
    monkeypatch.setattr(saver, "copied", lambda given, _: (given, lambda: None))
    assert not saved_while_training_goes_on(2), "the negative control: without a copy the next step shows"


def test_one_save_at_a_time_into_the_same_buffers(tmp_path, slow_disk):
    with Saver(tmp_path, 3, nothing) as saving:
        alive, buffers = [], set()
        for step in (1, 2, 3):
            saving.save(step, tensors(step), STATE)
            alive.append(sum(thread.name == "checkpoint" for thread in threading.enumerate()))
            buffers.add(saving._copies["model"]["w3"].data_ptr())
        assert alive == [1, 1, 1] and len(buffers) == 1
    assert len(slow_disk.threads) == 3
    assert threading.current_thread() not in slow_disk.threads
    for step in (1, 2, 3):
        loaded, _ = load_checkpoint(tmp_path / f"step-{step:06d}")
        assert torch.equal(loaded["model"]["w3"], tensors(step)["model"]["w3"])


def test_the_log_is_on_the_disk_before_the_checkpoint(tmp_path):
    order = []

    class Listening(files.Disk):
        def replace(self, source, target):
            order.append(target.name)
            super().replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "disk", Listening())
        with Saver(tmp_path, 1, lambda: order.append("log")) as saving:
            saving.save(1, tensors(), STATE)
    assert order == ["log", "step-000001"]


# Errors --------------------------------------------------------------------------------------------------------------


def failing(saving: Saver, monkeypatch, step: int = 2) -> None:
    """A save that will have failed in the background; the caller has heard nothing yet."""
    monkeypatch.setattr(files, "disk", FaultyDisk(3, no_space, only=("write",)))
    saving.save(step, tensors(), STATE)
    assert saving._thread is not None
    saving._thread.join()
    monkeypatch.setattr(files, "disk", files.Disk())


MESSAGE = r"step-000002: checkpoint not saved, No space left on device; .*run\.resume=auto"


@pytest.mark.parametrize("opportunity", ["check", "wait", "save", "leave", "interrupted"])
def test_an_error_comes_out_at_the_next_opportunity_and_once(tmp_path, monkeypatch, opportunity):
    save_checkpoint(tmp_path, 1, tensors(), STATE, keep=2)
    with pytest.raises(SaveError, match=MESSAGE), Saver(tmp_path, 2, nothing) as saving:
        saving.check()
        failing(saving, monkeypatch)
        if opportunity == "save":
            saving.save(3, tensors(), STATE)
        elif opportunity == "interrupted":
            raise Interrupted("stopped after step 2")
        elif opportunity != "leave":
            getattr(saving, opportunity)()
    saving.check()
    saving.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert find_checkpoint(tmp_path) == (tmp_path / "step-000001", [])


def test_another_error_of_the_run_goes_first(tmp_path, monkeypatch, caplog):
    with pytest.raises(KeyError), caplog.at_level(logging.WARNING), Saver(tmp_path, 2, nothing) as saving:
        failing(saving, monkeypatch)
        raise KeyError("something else")
    assert "step-000002: checkpoint not saved" in caplog.text


def test_every_way_out_waits_for_the_disk(tmp_path, slow_disk):
    for step, error in enumerate((None, Interrupted("a signal"), KeyError("a bug")), start=1):
        try:
            with Saver(tmp_path, 9, nothing) as saving:
                saving.save(step, tensors(), STATE)
                if error is not None:
                    raise error
        except (Interrupted, KeyError) as left:
            assert left is error
        assert load_checkpoint(tmp_path / f"step-{step:06d}")[1]["step"] == step


def test_check_does_not_wait(tmp_path, slow_disk):
    with Saver(tmp_path, 1, nothing) as saving:
        saving.save(1, tensors(), STATE)
        start = time.monotonic()
        saving.check()
        assert time.monotonic() - start < slow_disk.seconds and saving._thread is not None


@pytest.mark.gpu
def test_copies_from_a_gpu_are_of_their_moment(tmp_path, slow_disk):
    """The copy is only queued when `save` returns; the stream's order keeps the next step's changes out of it."""
    live = {"model": {"w": torch.ones(64 << 20, device="cuda")}}
    with Saver(tmp_path, 1, nothing) as saving:
        saving.save(1, live, STATE)
        live["model"]["w"].add_(1)
        assert saving._copies["model"]["w"].is_pinned()
    loaded, _ = load_checkpoint(tmp_path / "step-000001")
    assert bool((loaded["model"]["w"] == 1).all())
