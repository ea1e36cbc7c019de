"""Sharded checkpoints of full training under FSDP2 and HSDP: real ranks over gloo, any number before and after."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import safetensors
import torch

from qwen_train.train.blocks import BlockReader
from qwen_train.train.checkpoint import find_checkpoint, open_checkpoint
from tests.faults.runs import STOP_AFTER, Runs, digest, make_runs
from tests.faults.saves import load_checkpoint
from tests.scripts import Result, ScriptRunner, read_metrics
from tests.test_fsdp import SHARDING

pytestmark = [pytest.mark.launch, pytest.mark.ranks]

STEPS = 6
TOLERANCE = 1e-5
SLOW = [pytest.mark.slow]


class ShardedRuns:
    """Full training of the tiny model for six steps, a checkpoint every second, on so many ranks."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.folder = runs.folder

    def run(self, name: str, ranks: int, *more: str, replicas: int = 1, prelude: str = "", **how) -> Result:
        words = self.runs.arguments(name, "--lora.enabled=false", f"--run.steps={STEPS}", "--data.workers=0", *more)
        words = [word for word in words if not word.startswith(("--lora.r=", "--lora.dropout"))]
        if ranks > 1:
            how["environment"] = {"REPLICAS": str(replicas)} if replicas > 1 else {}
            how |= {"ranks": ranks}
            prelude = f"{SHARDING}\n{prelude}"
        output = self.folder / f"{name}.txt"
        return self.runs.scripts.run(output, "launch/sft.py", *words, prelude=prelude, **how)

    def finished(self, name: str, ranks: int, *more: str, **how) -> Path:
        result = self.run(name, ranks, *more, **how)
        assert result.code == 0, result.output
        return self.folder / name

    def stopped(self, name: str, ranks: int) -> Path:
        """A run that was told to leave in the second of its steps; its checkpoint."""
        result = self.run(name, ranks, prelude=STOP_AFTER.format(steps=2))
        assert result.code == 128 + signal.SIGTERM, result.output
        return max((self.folder / name / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, scripts: ScriptRunner) -> ShardedRuns:
    return ShardedRuns(make_runs("sft", tmp_path_factory.mktemp("sharded"), cache_dir, scripts))


@pytest.fixture(scope="module")
def one(sharded: ShardedRuns) -> Path:
    return sharded.finished("one", 1)


@pytest.fixture(scope="module")
def two(sharded: ShardedRuns) -> Path:
    return sharded.finished("two", 2)


def last(run: Path) -> Path:
    return run / f"checkpoints/step-{STEPS:06d}"


def curve(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read_metrics(run) if "train/loss" in line]


def close(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> bool:
    return [step for step, _ in one] == [step for step, _ in other] and all(
        abs(a - b) <= TOLERANCE * max(abs(a), 1) for (_, a), (_, b) in zip(one, other, strict=True)
    )


def test_every_rank_writes_its_share_and_no_more(one: Path, two: Path):
    names = {path.name for path in last(two).iterdir()}
    shards = {f"{stem}-0000{rank}-of-00002.safetensors" for stem in ("model", "optimizer") for rank in (1, 2)}
    assert names == {*shards, "state.json", "manifest.json"}
    whole = (last(one) / "optimizer.safetensors").stat().st_size
    sizes = [(last(two) / f"optimizer-0000{rank}-of-00002.safetensors").stat().st_size for rank in (1, 2)]
    assert all(0.45 < size / whole < 0.6 for size in sizes)
    manifest = json.loads((last(two) / "manifest.json").read_text())["manifest"]
    assert {*manifest["files"]} == names - {"manifest.json"}
    assert json.loads((last(two) / "state.json").read_text())["world_size"] == 2
    with safetensors.safe_open(last(two) / "model-00002-of-00002.safetensors", "pt") as file:
        places = json.loads(file.metadata()["blocks"])
        for name, place in places.items():
            assert place["offsets"][0] + file.get_slice(name).get_shape()[0] == place["shape"][0]
            assert place["offsets"][0] > 0 and not any(place["offsets"][1:])


def test_two_ranks_hold_what_one_holds(one: Path, two: Path):
    """The same names and shapes; the same values up to the order of sums."""
    (tensors, _), (expected, _) = load_checkpoint(last(two)), load_checkpoint(last(one))
    assert {stem: sorted(flat) for stem, flat in tensors.items()} == {s: sorted(flat) for s, flat in expected.items()}
    for stem, flat in expected.items():
        for name, tensor in flat.items():
            torch.testing.assert_close(tensors[stem][name], tensor, atol=1e-4, rtol=1e-3)


def test_a_rank_reads_its_own_part_only(two: Path):
    """Any window of any tensor, out of the files that hold it; a file that is missing shows."""
    reader, _ = open_checkpoint(last(two))
    whole = BlockReader(last(two), sorted(path.name for path in last(two).glob("*.safetensors")))
    for name in reader.names("model"):
        full = whole.read("model", name)
        assert full.shape == reader.shape("model", name)
        for rank, count in ((0, 3), (1, 3), (2, 3), (3, 4)):
            bounds = [round(len(full) * part / count) for part in (rank, rank + 1)]
            window = [slice(*bounds), *(slice(0, length) for length in full.shape[1:])]
            assert torch.equal(reader.read("model", name, window), full[bounds[0] : bounds[1]])
    half = BlockReader(last(two), ["model-00001-of-00002.safetensors"])
    with pytest.raises(ValueError, match="are in none of its files"):
        half.read("model", half.names("model")[0])


def saved_again(sharded: ShardedRuns, source: Path, name: str, ranks: int, **how) -> Path:
    """What another number of ranks makes of a checkpoint: loaded by a new run and saved before any step."""
    save_at_once = """
from qwen_train.train.progress import restore as restored
def restore(*args):
    progress = restored(*args)
    progress.step -= 1  # one more step, at a rate of 0, and it is saved again
    return progress
import qwen_train.sft
qwen_train.sft.restore = restore
qwen_train.sft.set_learning_rate = lambda optimizer, lr: None
import torch
torch.optim.AdamW.step = lambda self, closure=None: None
"""
    result = sharded.run(name, ranks, f"--run.resume={source}", prelude=save_at_once, **how)
    assert result.code == 0, result.output
    return last(sharded.folder / name)


@pytest.mark.parametrize(
    ("ranks", "replicas"),
    [(1, 1), (2, 1), pytest.param(4, 2, marks=SLOW), pytest.param(3, 1, marks=SLOW)],
    ids=["1", "2", "4 of HSDP", "3"],
)
@pytest.mark.parametrize("source", [pytest.param("one", marks=SLOW), "two"])
def test_it_is_loaded_bit_for_bit_on_any_number_of_ranks(
    sharded: ShardedRuns, request, source: str, ranks: int, replicas: int
):
    """1 -> 2, 2 -> 1, 2 -> 3, 2 -> 4 (two replicas of two shards): nothing of weights or moments changes on the way."""
    original = last(request.getfixturevalue(source))
    again = saved_again(sharded, original, f"{source}-to-{ranks}", ranks, replicas=replicas)
    expected, _ = load_checkpoint(original)
    found, state = load_checkpoint(again)
    assert state["world_size"] == ranks
    shards = ranks // replicas
    assert len(list(again.glob("model*.safetensors"))) == shards, "a replica's shards are written once"
    for stem, flat in expected.items():
        assert found[stem].keys() == flat.keys()
        for name, tensor in flat.items():
            assert found[stem][name].dtype == tensor.dtype and torch.equal(found[stem][name], tensor), name
    first = next(iter(expected["model"].values()))
    assert not torch.equal(first, first + 1e-6 * first.abs().max()), "the comparison would show a change"


@pytest.mark.parametrize(
    ("stages", "replicas"),
    [
        ((2, 1, 2), 1),
        pytest.param((1, 2, 1), 1, marks=SLOW),
        pytest.param((2, 4), 2, marks=SLOW),
    ],
    ids=["2-1-2", "1-2-1", "2-4 HSDP"],
)
def test_stopped_and_resumed_on_another_number_of_ranks(
    sharded: ShardedRuns, one: Path, stages: tuple[int, ...], replicas: int
):
    name = "stages-" + "-".join(map(str, stages))
    for ranks in stages[:-1]:
        checkpoint = sharded.stopped(name, ranks)
        assert json.loads((checkpoint / "state.json").read_text())["world_size"] == ranks
    result = sharded.run(name, stages[-1], replicas=replicas)
    assert result.code == 0 and f"going on from {checkpoint}" in result.output, result.output
    assert [step for step, _ in curve(sharded.folder / name)] == list(range(1, STEPS + 1))
    assert close(curve(one), curve(sharded.folder / name))
    model = "model/model.safetensors"
    assert (sharded.folder / name / model).stat().st_size == (one / model).stat().st_size


@pytest.mark.slow
def test_resumed_on_the_same_ranks_it_ends_bit_for_bit(sharded: ShardedRuns, two: Path):
    sharded.stopped("same", 2)
    same = sharded.finished("same", 2)
    for path in last(two).glob("*.safetensors"):
        assert digest(last(same) / path.name) == digest(path), path.name
    assert read_metrics(same) == read_metrics(two)


def test_an_adapter_stays_one_file(sharded: ShardedRuns):
    words = sharded.runs.arguments("adapter", "--run.steps=1")
    result = sharded.runs.scripts.run(
        sharded.folder / "adapter.txt", "launch/sft.py", *words, prelude=SHARDING, ranks=2
    )
    assert result.code == 0, result.output
    names = {path.name for path in (sharded.folder / "adapter/checkpoints/step-000001").iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


# --- damage, a full disk, kill -9 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "missing"])
def test_damage_to_any_rank_s_file_is_found_and_fallen_back_from(two: Path, tmp_path: Path, damage: str):
    names = sorted(path.name for path in last(two).iterdir())
    assert len(names) == 6
    for name in names:
        folder = shutil.copytree(two / "checkpoints", tmp_path / name)
        path = folder / last(two).name / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        written = {"truncated": bytes(data[:-1]), "emptied": b"", "flipped": bytes(data)}
        path.unlink()
        if damage in written:
            path.write_bytes(written[damage])
        found, skipped = find_checkpoint(folder)
        assert found == folder / f"step-{STEPS - 2:06d}"
        assert [p.name for p, _ in skipped] == [last(two).name] and name in skipped[0][1]


FAULT = """
import os
from qwen_train.train import files
from tests.faulty_disk import FaultyDisk, {fault}
class Faulty(FaultyDisk):
    def write(self, file, data):
        if {condition}:
            {fault}()
        return super().write(file, data)
files.disk = Faulty()
"""


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), 1])
def test_a_full_disk_on_any_rank_ends_the_run_with_its_name(sharded: ShardedRuns, two: Path, rank: int):
    """One rank's disk refuses its file of step 4: said with its name, nothing half-written, the run goes on later."""
    name = f"full-{rank}"
    condition = f"'step-000004' in file.name and 'optimizer-0000{rank + 1}-of' in file.name"
    result = sharded.run(name, 2, prelude=FAULT.format(fault="no_space", condition=condition))
    lines = [line for line in result.lines if line.startswith("error: ")]
    assert result.code == 2 and lines, result.output
    assert all("step-000004: checkpoint not saved" in line and "No space left on device" in line for line in lines)
    assert all("rank 1: " in line for line in lines) == (rank == 1)
    assert [path.name for path in (sharded.folder / name / "checkpoints").iterdir()] == ["step-000002"]
    assert sharded.runs.status(name)["outcome"] == "failed"
    if rank == 1:
        return
    again = sharded.finished(name, 2)
    assert read_metrics(again) == read_metrics(two)


PLACES = {  # what is being written of step 4
    "model-00001": [],
    "optimizer-00002": SLOW,
    "state.json": SLOW,
    "manifest.json": SLOW,
}


@pytest.mark.parametrize("place", [pytest.param(place, marks=marks) for place, marks in PLACES.items()])
def test_kill_9_of_a_rank_in_its_part_of_a_save(sharded: ShardedRuns, two: Path, place: str):
    name = f"killed-{place}"
    condition = f"'step-000004' in file.name and {place!r} in file.name"
    # As torchrun does: where one rank dies the others are ended too.
    prelude = (
        FAULT.format(fault="kill_self", condition=condition)
        + """
import threading, time
parent = os.getppid()
def watch():
    while len(open(f"/proc/{parent}/task/{parent}/children").read().split()) > 0:
        for child in open(f"/proc/{parent}/task/{parent}/children").read().split():
            if open(f"/proc/{child}/stat").read().rsplit(")", 1)[1].split()[0] == "Z":
                os.kill(os.getpid(), 9)
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
"""
    )
    result = sharded.run(name, 2, prelude=prelude)
    assert result.code == -signal.SIGKILL, result.output
    assert [path.name for path in (sharded.folder / name / "checkpoints").glob("step-000004")] == []
    again = sharded.run(name, 2)
    assert again.code == 0 and "deleted, left by a process that died while writing it" in again.output, again.output
    for path in last(two).glob("*.safetensors"):
        assert digest(last(sharded.folder / name) / path.name) == digest(path), path.name
    assert read_metrics(sharded.folder / name) == read_metrics(two)
