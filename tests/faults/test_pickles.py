"""No pickle is ever opened: one is planted in every place that is read, and what it would do does not happen.

The payload makes a file when it is unpickled. Beside good files it is left closed; where it stands instead of them the
run is refused in one line.
"""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.runs import Runs, make_runs, same_end
from tests.scripts import TINY, Result, ScriptRunner, num_lines, terminate_when

pytestmark = pytest.mark.launch

NAMES = [
    "pytorch_model.bin",
    "pytorch_model-00001-of-00001.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
    "model.pt",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "random_states_0.pkl",
    "training_args.bin",
    "custom_checkpoint_0.pkl",
    "consolidated.00.pth",
    "tokenizer.pkl",
    "cache.pkl",
    "state.pickle",
    "data.joblib",
    "weights.npy",
    ".metadata",
    "__0_0.distcp",
]


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.marker,))


class Planter:
    """Puts the payload into folders and tells whether it went off anywhere."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker
        self.plain = pickle.dumps(Bomb(marker))
        torch.save({"state_dict": Bomb(marker)}, marker.with_suffix(".pt"))
        self.zipped = marker.with_suffix(".pt").read_bytes()

    def plant(self, folder: Path) -> None:
        for number, name in enumerate(NAMES):
            if not (folder / name).exists():
                (folder / name).write_bytes(self.zipped if number % 2 else self.plain)
        (folder / "__init__.py").write_text(self.code)
        (folder / "modeling_qwen2.py").write_text(self.code)
        (folder / f"{folder.name}.py").write_text(self.code)

    @property
    def code(self) -> str:
        return f"import os\nos.mkdir({str(self.marker)!r})\n"

    def went_off(self) -> bool:
        return self.marker.exists()


@pytest.fixture(scope="module")
def planter(tmp_path_factory: pytest.TempPathFactory) -> Planter:
    return Planter(tmp_path_factory.mktemp("planted") / "marker")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, scripts: ScriptRunner) -> Runs:
    folder = tmp_path_factory.mktemp("pickles")
    return make_runs("sft", folder, folder / "cache", scripts)


@pytest.fixture(scope="module")
def finished(runs: Runs) -> Path:
    """A run and its adapter, on a base of its own."""
    result = runs.run("finished")
    assert result.code == 0, result.output
    return runs.folder / "finished"


def test_the_payload_works(planter: Planter):
    """The negative control: both forms, and the script, go off where somebody opens them."""
    openers = [
        lambda: pickle.loads(planter.plain),
        lambda: torch.load(planter.marker.with_suffix(".pt"), weights_only=False),
        lambda: exec(planter.code),
    ]
    for opened in openers:
        assert not planter.went_off()
        opened()
        assert planter.went_off()
        planter.marker.rmdir()


def test_in_a_run_that_goes_on(runs: Runs, finished: Path, planter: Planter):
    """In the run's folder, its checkpoints, each of them, its base, and the token cache."""
    log = runs.folder / "planted/metrics.jsonl"
    assert runs.run("planted", meanwhile=terminate_when(lambda: num_lines(log) >= 6)).code == 128 + signal.SIGTERM
    run = runs.folder / "planted"
    places = [run, run / "base", run / "checkpoints", *(run / "checkpoints").iterdir(), runs.cache_dir]
    places += [runs.cache_dir / "tokens", *(runs.cache_dir / "tokens").iterdir()]
    assert len(places) >= 8
    for place in places:
        planter.plant(place)
    result = runs.run("planted")
    assert result.code == 0 and "left closed: " in result.output, result.output
    assert not planter.went_off()
    for place in (run, run / "checkpoints", run / "base"):
        for name in NAMES:
            (place / name).unlink()
    same_end(finished, run)


@pytest.fixture(scope="module")
def model(finished: Path, planter: Planter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with weights, and the payload beside them."""
    folder = shutil.copytree(finished / "base", tmp_path_factory.mktemp("base") / "base")
    planter.plant(folder)
    return folder


def preferences(runs: Runs, name: str, *more: str) -> Result:
    for split in ("train", "eval"):
        lines = (TINY / f"dpo_{split}.jsonl").read_text().splitlines(keepends=True)[:8]
        (runs.folder / f"dpo_{split}.jsonl").write_text("".join(lines))
    these = Runs("dpo", runs.folder, runs.cache_dir, runs.scripts)
    words = [w for w in these.arguments(name, *more) if not w.startswith(("--model.from_scratch=true", "--model.path"))]
    return runs.scripts.run(runs.folder / f"{name}.txt", "launch/dpo.py", *words, "--run.steps=2")


def test_in_adapters_bases_and_the_cache_of_the_reference(
    runs: Runs, finished: Path, model: Path, planter: Planter, tmp_path: Path
):
    """DPO on a planted adapter and base, twice: the second start reads the planted cache of the reference."""
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model)}))
    planter.plant(adapter)
    for name in ("first", "second"):
        result = preferences(runs, name, f"--model.adapter={adapter}", "--reference.precompute=true")
        assert result.code == 0, result.output
        for place in [runs.cache_dir / "reference", *(runs.cache_dir / "reference").iterdir()]:
            if place.is_dir():
                planter.plant(place)
    merged = runs.scripts.run(
        tmp_path / "merge.txt", "launch/merge.py", "--adapter", str(adapter), "--out", str(tmp_path / "merged")
    )
    assert merged.code == 0, merged.output
    assert not planter.went_off()


# Instead of good files ------------------------------------------------------------------------------------------------


def refused(result: Result, *words: str) -> None:
    lines = [line for line in result.lines if line.startswith("error: ")]
    assert result.code == 2 and len(lines) == 1 and "Traceback" not in result.output, result.output
    for word in words:
        assert word in lines[0]


def test_a_base_of_pickles_is_refused(runs: Runs, model: Path, planter: Planter, tmp_path: Path):
    folder = shutil.copytree(model, tmp_path / "pickled")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    refused(runs.run("refused", f"--model.path={folder}", "--model.from_scratch=false"), "model.path", str(folder))
    assert not planter.went_off() and not (runs.folder / "refused").exists()


def test_an_adapter_of_pickles_is_refused(runs: Runs, finished: Path, planter: Planter, tmp_path: Path):
    folder = shutil.copytree(finished / "adapter", tmp_path / "pickled")
    (folder / "adapter_model.safetensors").unlink()
    planter.plant(folder)
    refused(preferences(runs, "refused", f"--model.adapter={folder}"), "model.adapter", str(folder))
    merging = runs.scripts.run(
        tmp_path / "merge.txt", "launch/merge.py", "--adapter", str(folder), "--out", str(tmp_path / "merged")
    )
    refused(merging, str(folder))
    assert not planter.went_off() and not (runs.folder / "refused").exists()


def test_code_beside_a_model_is_not_run(runs: Runs, finished: Path, planter: Planter, tmp_path: Path):
    """config.json and tokenizer_config.json that ask for classes of their own: without trust_remote_code, no."""
    folder = shutil.copytree(finished / "base", tmp_path / "own-code")
    planter.plant(folder)
    own: dict[str, Any] = {"AutoConfig": "modeling_qwen2.C", "AutoModelForCausalLM": "modeling_qwen2.M"}
    own["AutoTokenizer"] = ["modeling_qwen2.T", None]
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"auto_map": own}))
    result = runs.run("own-code", f"--model.path={folder}", "--model.from_scratch=false", "--run.steps=1")
    assert result.code in (0, 2) and "Traceback" not in result.output, result.output  # the known classes, or refused
    assert not planter.went_off()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.bin", "rows.npy", "rows.py", "rows"])
def test_data_of_pickles_or_scripts_are_refused(runs: Runs, planter: Planter, tmp_path: Path, name: str):
    path = tmp_path / name
    if path.suffix == ".py":
        path.write_text(planter.code)
    elif path.suffix:
        path.write_bytes(planter.plain)
    else:  # a folder with a loading script of its own name, as `datasets` once ran it
        path.mkdir()
        planter.plant(path)
    refused(runs.run("refused", f"--data.train={path}"), "data.train", str(path))
    assert not planter.went_off() and not (runs.folder / "refused").exists()


def test_a_datasets_folder_is_read_and_its_pickles_are_not(runs: Runs, planter: Planter, tmp_path: Path):
    import datasets

    rows = [json.loads(line) for line in (runs.folder / "sft_train.jsonl").read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    planter.plant(tmp_path / "set")
    result = runs.run("from-disk", f"--data.train={tmp_path / 'set'}", "--run.steps=1")
    assert result.code == 0, result.output
    assert not planter.went_off()
