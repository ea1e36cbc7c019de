"""What the scripts tell a person who was interrupted, has mistyped a file, or has no network."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from tests.scripts import ROOT, Result, ScriptRunner, num_lines, terminate_when

LONG = 5000
SMALL = {
    "run": {"steps": LONG, "log_every": 1, "save_every": 0},
    "batch": {"sequences_per_step": 1, "tokens_per_microbatch": 256},
}


@pytest.fixture
def mine(tmp_path: Path, cache_dir: Path) -> list[str]:
    """A config of the user's own, cut down from the embedded one, that gives the run no name."""
    config = yaml.safe_load((ROOT / "configs/tiny/sft.yaml").read_text())
    for section, values in SMALL.items():
        config[section] |= values
    del config["data"]["eval"]
    for name in ("name", "eval_every", "eval_samples", "eval_sample_tokens"):
        del config["run"][name]
    config["data"]["cache_dir"] = str(cache_dir)
    config["run"]["dir"] = str(tmp_path / "runs")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    return ["launch/sft.py", "--config", str(tmp_path / "mine.yaml")]


def stopped(scripts: ScriptRunner, folder: Path, command: list[str], lines: int) -> tuple[Result, Path, dict]:
    """A run that SIGTERM reached after so many log lines: what it said, its folder and its status."""

    def far_enough() -> bool:
        return any(num_lines(path) >= lines for path in (folder / "runs").glob("*/metrics.jsonl"))

    result = scripts.run(folder / "output.txt", *command, meanwhile=terminate_when(far_enough))
    assert result.code == 128 + signal.SIGTERM, result.output
    (path,) = (folder / "runs").iterdir()
    return result, path, json.loads((path / "status.json").read_text())


def test_an_interrupted_run_says_what_goes_on_with_it(tmp_path: Path, scripts: ScriptRunner, mine: list[str]):
    """A name made up from the time has to be given; with it the run goes on, and then again."""
    result, folder, status = stopped(scripts, tmp_path, mine, lines=2)
    step = status["step"]
    assert step >= 2 and (folder / f"checkpoints/step-{step:06d}").is_dir()
    assert status["reason"] == f"stopped after step {step} of {LONG}; go on with --run.name {folder.name}"
    assert status["reason"] in result.output and folder.name.startswith("mine-")
    option = status["reason"].split("go on with ")[1].split()
    again, _, status = stopped(scripts, tmp_path, [*mine, *option], lines=step + 2)
    assert f"going on from {folder}/checkpoints/step-{step:06d}" in again.output
    assert status["step"] > step


def test_a_named_run_is_started_again(tmp_path: Path, scripts: ScriptRunner, mine: list[str]):
    _, _, status = stopped(scripts, tmp_path, [*mine, "--run.name=named"], lines=2)
    assert status["reason"] == f"stopped after step {status['step']} of {LONG}; start again to go on"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_config_for_a_gpu_that_meets_none_is_told(tmp_path: Path, scripts: ScriptRunner, mine: list[str], dtype: str):
    """A driver that does not fit torch would otherwise show as a very slow run."""
    arguments = [*mine, f"--model.dtype={dtype}", "--data.train=gone.jsonl"]
    result = scripts.run(tmp_path / "output.txt", *arguments, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert result.code == 2, result.output
    assert ("warning: no CUDA device is seen: training on the CPU" in result.output) == (dtype == "bfloat16")


@pytest.mark.parametrize("script", ["sft", "dpo"])
@pytest.mark.parametrize("field", ["data.train", "data.eval"])
def test_a_missing_file_is_found_before_anything_is_asked_of_the_hub(
    tmp_path: Path, scripts: ScriptRunner, script: str, field: str
):
    """The model's hub id leads nowhere (no network): the file is what is complained about, and no folder is left."""
    prelude = f"import os; os.environ.update({{'HF_HOME': {str(tmp_path)!r}}})"
    arguments = [f"--run.dir={tmp_path / 'runs'}", "--model.path=nobody/nothing", f"--{field}=gone.jsonl"]
    if script == "sft":
        arguments.append("--model.from_scratch=false")
    result = scripts.run(tmp_path / "output.txt", f"launch/{script}.py", *arguments, prelude=prelude)
    assert result.code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert errors == [f"error: {field}: 'gone.jsonl' does not exist; give a file, a folder or a hub id (name[:split])"]
    assert not (tmp_path / "runs").exists() or not os.listdir(tmp_path / "runs")
    assert "Loading weights" not in result.output
