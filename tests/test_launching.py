"""configs/accelerate/*.yaml: what accelerate makes of them, and that the project follows what they say."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from qwen_train.train.sharding import judge_settings

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


def environment(file: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, str]:
    """The environment that `accelerate launch --config_file file` gives each process."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE", "FSDP", "PARALLELISM"))]:
        monkeypatch.delenv(name)
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(file), *more, "launch/sft.py"])
    args, _, _ = _validate_launch_command(args)
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_is_asked_for_that_is_not_followed(file: Path, monkeypatch: pytest.MonkeyPatch):
    given = environment(file, monkeypatch)
    assert given["ACCELERATE_MIXED_PRECISION"] == "no" and given["ACCELERATE_DYNAMO_BACKEND"] == "NO"
    assert given.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") == "1"
    assert given.get("FSDP_ACTIVATION_CHECKPOINTING", "false") == "false"
    assert given.get("FSDP_OFFLOAD_PARAMS", "false") == "false"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_sharding_is_of_version_2_and_where_it_is_named(file: Path, monkeypatch: pytest.MonkeyPatch):
    given = environment(file, monkeypatch)
    assert (given.get("ACCELERATE_USE_FSDP") == "true") is file.stem.startswith("fsdp2")
    if file.stem.startswith("fsdp2"):
        assert given["FSDP_VERSION"] == "2" and given["FSDP_RESHARD_AFTER_FORWARD"] == "true"


def test_hybrid_sharding_replicates_over_machines(monkeypatch: pytest.MonkeyPatch):
    file = ROOT / "configs/accelerate/fsdp2_hsdp.yaml"
    given, settings = environment(file, monkeypatch), yaml.safe_load(file.read_text())
    replicas, shards = (int(given[f"PARALLELISM_CONFIG_DP_{name}_SIZE"]) for name in ("REPLICATE", "SHARD"))
    assert (replicas, shards) == (settings["num_machines"], settings["num_processes"] // settings["num_machines"])
    assert "ACCELERATE_USE_PARALLELISM_CONFIG" not in environment(file.with_name("fsdp2.yaml"), monkeypatch)


@pytest.mark.parametrize(("stem", "kind"), [("fsdp2", "MULTI_CPU"), ("fsdp2", "NO"), ("ddp", "MULTI_GPU")])
def test_sharding_that_does_not_take_place_is_said(stem: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    """accelerate turns FSDP on for several GPUs only, and says nothing elsewhere."""
    for name, value in environment(ROOT / f"configs/accelerate/{stem}.yaml", monkeypatch).items():
        monkeypatch.setenv(name, value)
    dynamo = SimpleNamespace(backend=SimpleNamespace(value="NO"))
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType[kind], state=SimpleNamespace(dynamo_plugin=dynamo)
    )
    notes = judge_settings(accelerator)
    assert ["FSDP is ignored" in note for note in notes] == ([True] if stem == "fsdp2" else [])


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16", "fp8"])
def test_mixed_precision_that_accelerate_is_asked_for_is_ignored_and_said(
    precision: str, monkeypatch: pytest.MonkeyPatch
):
    environment(ROOT / "configs/accelerate/single.yaml", monkeypatch)  # nothing is left of what is set here
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    dynamo = SimpleNamespace(backend=SimpleNamespace(value="NO"))
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.NO, state=SimpleNamespace(dynamo_plugin=dynamo))
    line = f"accelerate: mixed_precision {precision} is ignored: model.dtype and model.quantization say"
    assert judge_settings(accelerator) == ([] if precision == "no" else [line])
