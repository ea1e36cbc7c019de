"""Refusals before any data is read: packages that are missing, folders that are no model, targets of LoRA."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest

from qwen_train.command_line import load_config
from qwen_train.config import DPOConfig, SFTConfig
from qwen_train.data.sources import is_hub_id
from qwen_train.train import preflight as preflights
from qwen_train.train.preflight import preflight
from tests.scripts import ROOT, TINY, ScriptRunner


def config(*words: str, kind: type[SFTConfig] = SFTConfig) -> SFTConfig:
    return load_config(kind, [f"--{word}" for word in words])[0]


def test_the_embedded_defaults_pass():
    preflight(config())
    preflight(config(kind=DPOConfig))


# ---- packages ----


@pytest.mark.parametrize("words", [("optim.name=adamw_8bit",), ("model.quantization=nf4", "model.dtype=bfloat16")])
def test_bitsandbytes_is_missed_before_any_data(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    preflight(config(*words))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # hidden: an import of it fails
    with pytest.raises(ValueError, match=rf"^{words[0].replace('=', ': ')} needs bitsandbytes, .*; pip install bitsa"):
        preflight(config(*words))
    preflight(config())  # who does not ask for it needs no bitsandbytes


@pytest.mark.launch
def test_the_script_says_what_to_install(scripts: ScriptRunner, tmp_path: Path):
    given = (f"--run.dir={tmp_path}", f"--data.cache_dir={tmp_path / 'cache'}", "--optim.name=adamw_8bit")
    hidden = "import sys; sys.modules['bitsandbytes'] = None"
    result = scripts.run(tmp_path / "out.txt", "launch/sft.py", *given, prelude=hidden)
    assert result.code == 2 and len(result.lines) == 1, result.output
    assert result.lines[0].startswith("error: optim.name: adamw_8bit needs bitsandbytes")
    assert not (tmp_path / "tiny-sft").exists() and not (tmp_path / "cache/tokens").exists()


# ---- model folders ----


def test_names_that_the_hub_can_have():
    assert all(map(is_hub_id, ("gpt2", "Qwen/Qwen2.5-7B", "org/a_b-c.d")))
    assert not any(map(is_hub_id, ("runs/a/adapter", "../base", "/base", "org/", "a--b", "", "x" * 97)))


def a_model(folder: Path, **files: str | None) -> Path:
    shutil.copytree(TINY / "model", folder)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content or "")
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config__json": '{"a'}, r"config.json cannot be read: .*line 1.*; copy the model's file again"),
        ({"config__json": "[]"}, r"config.json holds a list and not an object"),
        ({"config__json": "{}"}, r"no model config in .*model_type"),
        ({"config__json": '{"model_type": "llama"}'}, r"is a llama model; this project trains"),
        (
            {"config__json": '{"model_type": "qwen2", "quantization_config": {"quant_method": "awq", "bits": 4}}'},
            r"are stored quantised \(awq\), which is not read here; give the model they were made of",
        ),
        (
            {"config__json": '{"model_type": "qwen2", "hidden_act": "swish7"}'},
            r"asks for hidden_act 'swish7', which transformers does not know; copy the model's file again",
        ),
        ({"tokenizer__json": ""}, r"tokenizer.json cannot be read"),
        ({}, r"no weights \(model.safetensors\) in .*; check the path, or set model.from_scratch"),
        ({"pytorch_model__bin": ""}, r"has its weights as pytorch_model.bin, a pickle, .* not opened here"),
        ({"pytorch_model__bin__index__json": "{}"}, r"has its weights as pytorch_model.bin, a pickle"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, files: dict[str, str], message: str):
    folder = a_model(tmp_path / "model", **files)
    with pytest.raises(ValueError, match=f"^model.path: .*{message}") as refused:
        preflight(config(f"model.path={folder}", "model.from_scratch=false"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_are_looked_for_by_name_only(tmp_path: Path, name: str):
    folder = a_model(tmp_path / "model")
    (folder / name).touch()
    preflight(config(f"model.path={folder}", "model.from_scratch=false"))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "{file}"])
def test_paths_that_are_no_folder(tmp_path: Path, path: str):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"^model.path: .*(does not exist|is a file); give "):
        preflight(config(f"model.path={path.format(file=file)}"))


@pytest.mark.launch
@pytest.mark.parametrize(("script", "needed"), [("sft.py", "config.json"), ("check.py", "tokenizer_config.json")])
def test_a_hub_that_cannot_be_reached_is_asked_once(script: str, needed: str, tmp_path: Path):
    """One line, instead of five more tries with two lines of log each; of a folder beside others, that it is not."""
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    unreached = "the hub could not be reached (ConnectError: [Errno 111] Connection refused); give a model's folder"
    for path, said in (
        ("Qwen/Qwen2.5-7B-Instruct", f" is not a folder here, its {needed} is not in the hub's cache, and {unreached}"),
        ("tests/qwen", "the folder tests/qwen does not exist; give a model's folder or hub id"),
    ):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, f"launch/{script}", f"--model.path={path}", f"--run.dir={tmp_path}"],
            cwd=ROOT,
            env=os.environ | nobody,
            capture_output=True,
            text=True,
            timeout=120,
        )
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and done.stdout == "" and line.startswith("error: model.path: ") and said in line
        assert time.monotonic() - began < 45, "a download tries for a minute"


@pytest.mark.parametrize("script", ["sft", "check"])
def test_a_hub_model_in_the_cache_needs_no_hub(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a folder has the name of its owner."""
    snapshot = tmp_path / "hub" / "models--org--a-model" / "snapshots" / ("0" * 40)
    shutil.copytree(TINY / "model", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(preflights, "get_hf_file_metadata", lambda *_, **__: pytest.fail("the hub was asked"))
    needed = {"sft": "config.json", "check": "tokenizer_config.json"}[script]
    preflights.check_place("model.path", "org/a-model", None, needed)

    def unreached(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(preflights, "get_hf_file_metadata", unreached)
    with pytest.raises(ValueError, match=r"^model.path: the folder org/another does not exist; give "):
        preflights.check_place("model.path", "org/another", None, needed)
    with pytest.raises(ValueError, match=r"^model.path: who/another is not a folder here, .*\(OSError: no route\)"):
        preflights.check_place("model.path", "who/another", None, needed)


def test_the_other_model_of_dpo_too(tmp_path: Path):
    folder = a_model(tmp_path / "model", pytorch_model__bin="")
    words = ("reference.source=model", f"reference.path={folder}")
    with pytest.raises(ValueError, match=r"^reference.path: .*a pickle"):
        preflight(config(*words, kind=DPOConfig))


# ---- targets of LoRA ----


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, down_proj]", ".*[qv]_proj", "[layers.0.mlp.up_proj]"])
def test_targets_that_there_are(targets: str):
    preflight(config(f"lora.target_modules={targets}"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("[q_proj, nope]", "nope is the name of no layer of .*; there are down_proj, gate_proj, .* or say all-linear"),
        ("q_proj", r"q_proj is the name of no layer of .*; write \[q_proj\]"),
        ("[norm]", "norm also means model.norm, a Qwen2RMSNorm, which cannot have an adapter; name some of down_proj"),
        ("[mlp]", "mlp also means model.layers.0.mlp, a Qwen2MLP"),
        (".*_head", r"\.\*_head also means lm_head, a Linear"),
        ("*_proj", r"\*_proj is no pattern \(.*\); give names as \[q_proj, v_proj\]"),
    ],
)
def test_targets_that_there_are_not(targets: str, message: str):
    with pytest.raises(ValueError, match=f"^lora.target_modules: {message}"):
        preflight(config(f"lora.target_modules={targets}"))


def test_targets_are_looked_at_without_memory(tmp_path: Path):
    """The shape of a 72B: its weights would be 145 GB."""
    shape = json.loads((TINY / "model/config.json").read_text())
    shape |= {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8}
    folder = a_model(tmp_path / "model", config__json=json.dumps(shape | {"num_hidden_layers": 80}))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^lora.target_modules: nope"):
        preflight(config(f"model.path={folder}", "lora.target_modules=[nope]"))
    assert time.monotonic() - start < 20
