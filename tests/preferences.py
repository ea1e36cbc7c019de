"""What the tests of DPO share: a tiny SFT start, configs upon it, models in this process."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen_train.command_line import load_config
from qwen_train.config import DPOConfig
from qwen_train.data.chat import ChatOptions
from qwen_train.data.packing import Batch, pack_pairs
from qwen_train.data.stream import collate_preferences
from qwen_train.data.tokenize import TokenDataset, tokenize
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.model.packed import PackedLM
from tests.scripts import TINY, Result, ScriptRunner

FEW_STEPS = ("--run.steps", "4", "--run.log_every", "1", "--run.eval_every", "0", "--run.save_every", "0")
SMALL = ("--run.eval_samples", "4", "--run.eval_sample_tokens", "8", "--data.eval_sft", "null")


def make_start(scripts: ScriptRunner, folder: Path, cache_dir: Path, *arguments: str) -> Path:
    """The adapter of an SFT run of 12 steps, large enough to move every log-probability."""
    done = scripts.run(
        folder / "sft.txt", "launch/sft.py", "--run.dir", str(folder), "--run.steps", "12", "--lora.r", "4",
        "--data.cache_dir", str(cache_dir), "--data.train", str(few_conversations(folder)),
        "--data.eval", str(TINY / "sft_eval.jsonl"), "--run.eval_samples", "2", "--run.save_every", "0", *arguments,
    )  # fmt: skip
    assert done.code == 0, done.output
    return folder / "tiny-sft" / "adapter"


def few_conversations(folder: Path) -> Path:
    path = folder / "sft.jsonl"
    path.write_text("".join((TINY / "sft_train.jsonl").open().readline() for _ in range(1)))
    lines = (TINY / "sft_train.jsonl").read_text().splitlines()[:200]
    path.write_text("\n".join(lines) + "\n")
    return path


def few_pairs(folder: Path, count: int = 48, name: str = "dpo_train.jsonl") -> Path:
    path = folder / f"{count}-{name}"
    path.write_text("\n".join((TINY / name).read_text().splitlines()[:count]) + "\n")
    return path


def run_dpo(
    scripts: ScriptRunner, start: Path | None, folder: Path, cache_dir: Path, *arguments: str, **how: Any
) -> Result:
    """launch/dpo.py on 48 pairs for 4 steps into `folder`/tiny-dpo."""
    folder.mkdir(exist_ok=True)
    pairs, held_out = few_pairs(folder), few_pairs(folder, 16, "dpo_eval.jsonl")
    return scripts.run(
        folder / "dpo.txt", "launch/dpo.py", "--config", str(TINY / "dpo.yaml"), "--run.dir", str(folder),
        "--data.cache_dir", str(cache_dir), "--data.train", str(pairs), "--data.eval", str(held_out),
        "--model.path", str(TINY / "model"), "--model.adapter", "null" if start is None else str(start),
        *FEW_STEPS, *SMALL, *arguments, **how,
    )  # fmt: skip


def dpo_config(*arguments: str) -> DPOConfig:
    config, _ = load_config(
        DPOConfig, ["--model.dtype", "float32", "--model.compile", "false", "--model.checkpoint_layers", "0",
                    "--batch.tokens_per_microbatch", "2048", "--data.train", "-", *arguments], embedded=False
    )  # fmt: skip
    return config


def load(config: DPOConfig, device: str = "cpu") -> PackedLM:
    tokenizer = load_tokenizer(config.model)
    return load_model(config, tokenizer, torch.device(device), Path("/nonexistent"), True)


def disturb(model: PackedLM, scale: float = 0.05, seed: int = 0) -> None:
    """Give every trained parameter random values: a policy that is far from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def pairs_of(config: DPOConfig, path: Path, cache_dir: Path) -> TokenDataset:
    return tokenize(
        "dpo", str(path), load_tokenizer(config.model), ChatOptions(max_length=256), workers=0, cache_dir=cache_dir
    )


def ids(data: TokenDataset, rows: range) -> list[tuple[Any, Any, Any]]:
    columns = data.dataset.with_format("numpy")
    return [tuple(columns[row][name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in rows]


def batch_of(data: TokenDataset, rows: range, share_prompt: bool = True) -> Batch:
    return collate_preferences(data.dataset, share_prompt)(list(rows))


def swapped(pairs: list[tuple[Any, Any, Any]]) -> Batch:
    return pack_pairs([(prompt, rejected, chosen) for prompt, chosen, rejected in pairs], range(len(pairs)), True)


def edit_adapter(source: Path, target: Path, change: Any) -> Path:
    """A copy of an adapter folder whose tensors went through `change(name, tensor)`."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, target / "adapter_model.safetensors")
    return target


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
