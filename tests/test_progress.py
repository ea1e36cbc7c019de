"""Going on: the data, their order, the start and the config are the run's own, or the change is accepted and noted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen_train.config import DataConfig, DPOConfig, LoraConfig, LossConfig, ModelConfig, RunConfig, SFTConfig, as_dict
from qwen_train.loss.preference import LOSSES
from qwen_train.train import progress
from qwen_train.train.changes import changes_since, written_out
from qwen_train.train.checkpoint import save_checkpoint
from qwen_train.train.folder import RunFolder, open_run
from qwen_train.train.status import write_status


def config(tmp_path: Path) -> SFTConfig:
    data = DataConfig(train="x", cache_dir=str(tmp_path / "cache"))
    return SFTConfig(data=data, run=RunConfig(name="a", dir=str(tmp_path / "runs")))


@pytest.fixture
def resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """resumed(accept, stored fields...): the history of a run that goes on from a checkpoint of them."""
    now = {"data": "these", "order": "as they come", "start": {"model.path": "base", "model.adapter": "start"}}
    data: Any = SimpleNamespace(report=SimpleNamespace(content=now["data"]))
    stream: Any = SimpleNamespace(order_digest=lambda step: now["order"] if step == 5 else "of another epoch")
    run: Any = SimpleNamespace(from_main=lambda function: function(), note=print)
    monkeypatch.setattr(progress, "fingerprint_start", lambda folder: now["start"])
    monkeypatch.setattr(progress, "trainable_parameters", lambda model: {})
    for name in ("place_masters", "load_trainable", "load_optimizer_state"):
        monkeypatch.setattr(progress, name, lambda *_: None)

    def go_on(accept: bool, but: str = "", **stored: Any) -> list[str]:
        state = {"run_id": "r", "config": as_dict(config(tmp_path)), **now, **stored}
        state.pop(but, None)
        checkpoint = save_checkpoint(tmp_path / "checkpoints", 5, {"model": {}, "optimizer": {}}, state, keep=1)
        plain = config(tmp_path)
        given = replace(plain, run=replace(plain.run, accept_changes=accept))
        folder = RunFolder(tmp_path, given, False, "r", checkpoint, ())
        model: Any = SimpleNamespace(named_parameters=dict)
        for _ in range(2):  # a start that was cut short before its first save is no second change
            gone_on = progress.restore(run, folder, model, model, data, stream)
            assert (gone_on.data, gone_on.start) == (now["data"], now["start"])
        return folder.history

    return go_on


@pytest.mark.parametrize(
    ("stored", "message", "line"),
    [
        ({"data": "others"}, "the data are no longer those of the run", "the data are others"),
        ({"order": "another"}, "the rows no longer come in the order", "the order of the rows is another"),
        ({"but": "order"}, "it is of an earlier version", "the data may be others"),
        ({"start": {"model.path": "x", "model.adapter": "start"}}, "model.path is not", "model.path is another"),
        ({"start": {"model.path": "base"}}, "model.adapter is not", "model.adapter is another"),
        ({}, "", ""),
        ({"but": "start"}, "", ""),
    ],
)
def test_other_data_another_order_and_another_start_need_a_word(resumed, stored: Any, message: str, line: str):
    if not message:
        assert resumed(False, **stored) == []
        return
    with pytest.raises(ValueError, match=rf"step-000005: {message}.*; put that back, .* or set run.accept_changes"):
        resumed(False, **stored)
    (noted,) = resumed(True, **stored)
    assert noted.startswith(f"changed after step-000005: {line}")


def test_a_config_of_an_earlier_version_is_the_same_config(tmp_path: Path):
    """Fields that it did not have stood at their defaults, null at what the loss and the rank made of it."""
    given = DPOConfig(data=DataConfig(train="x"), loss=LossConfig(name="cpo"), lora=LoraConfig(r=4))
    stored = as_dict(given)
    assert stored["loss"]["sft_weight"] is None and stored["lora"]["alpha"] is None
    del stored["lora"]["use_rslora"], stored["optim"]["spike_zscore"]
    assert changes_since(stored, given) == [] == changes_since(as_dict(written_out(given)), given)

    (change,) = changes_since(stored, replace(given, lora=LoraConfig(r=4, use_rslora=True)))
    assert (change.field, change.old, change.new, change.changes_result) == ("lora.use_rslora", False, True, True)
    (change,) = changes_since(stored, replace(given, loss=LossConfig(name="cpo", sft_weight=0.5)))
    assert (change.field, change.old, change.new) == ("loss.sft_weight", 1.0, 0.5)
    del stored["loss"]  # of an SFT run
    assert {change.field for change in changes_since(stored, given)} == {f"loss.{name}" for name in vars(given.loss)}


def test_a_default_of_a_loss_that_has_changed_is_a_change(monkeypatch: pytest.MonkeyPatch):
    given = DPOConfig(data=DataConfig(train="x"), loss=LossConfig(name="simpo"))
    stored = as_dict(written_out(given))
    assert stored["loss"]["simpo_gamma"] == 0.5 and stored["lora"]["alpha"] == 2 * given.lora.r
    defaults = LOSSES["simpo"].defaults | {"simpo_gamma": 0.7}
    monkeypatch.setitem(LOSSES, "simpo", SimpleNamespace(defaults=defaults))
    (change,) = changes_since(stored, given)
    assert (change.field, change.old, change.new) == ("loss.simpo_gamma", 0.5, 0.7)


def test_another_place_has_to_be_the_same_thing(tmp_path: Path):
    """Left to the comparison of what lies there, once there is something to compare with; not of a finished run."""
    given = config(tmp_path)
    moved = replace(given, data=replace(given.data, train="y"))
    path = open_run(given).path
    with pytest.raises(ValueError, match=r"data.train was 'x' and is now 'y'"):
        open_run(moved)
    state = {"run_id": (path / "run_id").read_text(), "config": as_dict(given)}
    save_checkpoint(path / "checkpoints", 5, {}, state, keep=1)
    folder = open_run(moved)
    assert "data.train: x -> y" in folder.notes and folder.history == []
    with pytest.raises(ValueError, match=r"optim.lr was .* and is now 1.0; restore"):
        open_run(replace(moved, optim=replace(moved.optim, lr=1.0)))
    (path / "adapter").mkdir()
    write_status(path, "finished", result=str(path / "adapter"))
    with pytest.raises(ValueError, match=r"cannot be changed or extended: data.train was 'x' and is now 'y'"):
        open_run(moved)


@pytest.mark.parametrize("model", [{}, {"from_scratch": True}], ids=["read", "drawn"])
def test_a_start_is_its_weights_and_what_its_config_makes_of_them(model: dict[str, bool], tmp_path: Path):
    """The same weights with another rotary base answer otherwise; who wrote the file, and where, does not matter."""

    def start(name: str, weight: float = 0.0, **values: Any) -> dict[str, str]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "rope_theta": 1e6, **values}))
        save_file({"w": torch.full((3, 100), weight)}, folder / "model.safetensors")
        given = replace(config(tmp_path), model=ModelConfig(path=str(folder), **model), lora=LoraConfig(enabled=False))
        return progress.fingerprint_start(RunFolder(tmp_path, given, True, "r", None, ()))

    begun = start("a")
    assert start("b", transformers_version="6.0", torch_dtype="float16") == begun
    assert start("c", rope_theta=1e4) != begun
    assert start("d", weight=1.0) != begun or model, "drawn weights lie in the checkpoint alone"
