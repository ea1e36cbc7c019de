"""The end of a run: its adapter or model folder, its card, its last word."""

import importlib.metadata
import json
import math
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qwen_train.config import DataPaths, SFTConfig, as_dict
from qwen_train.data.packing import Batch
from qwen_train.model.adapters import base_fingerprint
from qwen_train.model.load import PackedLM, trainable_parameters
from qwen_train.output.export import model_card, shown_path, write_adapter, write_full_model, write_model_card
from qwen_train.output.merge import score, write_delta, write_joined
from qwen_train.train.distributed import Run
from qwen_train.train.files import write_bytes_atomic, write_json_atomic
from qwen_train.train.folder import Progress, RunFolder
from qwen_train.train.metrics import write_status

OUTCOMES = {
    "eval/loss": "held-out loss",
    "eval/logps/accuracies": "held-out preference accuracy (chosen is the likelier answer)",
    "eval/rewards/accuracies": "held-out reward accuracy (chosen gained more since the start)",
    "eval/exact_match": "right answers",
    "eval/sft/exact_match": "right answers of the SFT evaluation",
}
"""What a run says of itself in the end: metric, before -> after."""
PACKAGES = ("torch", "transformers", "peft", "accelerate")


def write_result(
    run: Run,
    folder: RunFolder,
    model: PackedLM,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    progress: Progress,
    probe: Batch,
) -> None:
    """Write `adapter/` or `model/` with a model card, mark the run finished and say what came of it.

    After a start from a merged adapter `adapter/` holds both on the original base, and `adapter_delta/` this run's
    part; `probe`, a few training rows, proves it. All ranks call it, since sharded weights are gathered; rank 0 writes.
    """
    tensors = run.whole(trainable_parameters(model))
    start = config.model.adapter if config.lora.enabled and config.model.adapter_start == "merge" else None
    expected = score(model, probe) if start is not None else None
    if not run.is_main:
        return
    lora = isinstance(model.lm, PeftModel)
    target = folder.path / ("adapter" if lora else "model")
    base_name = str(folder.base) if config.model.from_scratch else config.model.path
    first, last = _held_out_metrics(folder)
    card: dict[str, Any] = {
        "kind": "adapter" if lora else "full",
        "method": "SFT" if type(config) is SFTConfig else "DPO",
        "base_name": base_name,
        "config": as_dict(config),
        "facts": {
            "steps": progress.step,
            "tokens": progress.num_tokens,
            "skipped steps": progress.skipped,
            "processes": run.world_size,
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "metrics": last,
        "datasets": _paths(config.data.train),
        "lora": None,
        "name": config.run.name,
    }
    if isinstance(model.lm, PeftModel) and start is not None and expected is not None:
        fingerprint = base_fingerprint(base_name, config.model.revision)
        delta = folder.path / "adapter_delta"
        write_delta(delta, start, base_name, fingerprint, model.lm, tensors, tokenizer)
        joined = write_joined(start, delta, target, base_name, model, tokenizer, probe, expected)
        run.note(joined.note)
        target = joined.folder
        card["kind"] = "adapter" if joined.r else "merged"
        card["lora"] = {"r": joined.r, "use_dora": False} if joined.r else None
        card["facts"]["start"] = f"{shown_path(start)}, merged"
        if joined.r:
            own: Any = model.lm.peft_config["default"]
            card["facts"]["rank"] = f"{joined.r}: {joined.r - own.r} of the start and {own.r} of this run"
        card["facts"]["as written against as trained (nats a token)"] = str(joined.difference)
        write_model_card(target, **card)
    elif isinstance(model.lm, PeftModel):
        adapter: Any = model.lm.peft_config["default"]  # an adapter that was continued has its own rank
        card["lora"] = {"r": adapter.r, "use_dora": adapter.use_dora}
        text = model_card(target, **card)
        write_adapter(target, model.lm, tensors, tokenizer, base_name, card=text)
        write_json_atomic(target / "base.json", {"base_sha256": base_fingerprint(base_name, config.model.revision)})
    else:
        dtype = getattr(torch, config.model.dtype)
        write_full_model(target, model.causal_lm, tensors, tokenizer, dtype=dtype, card=model_card(target, **card))
    write_bytes_atomic(folder.path / "README.md", model_card(folder.path, weights=target.name, **card).encode())
    write_status(folder.path, "finished", step=progress.step, result=str(target))
    for name, title in OUTCOMES.items():
        if name in first and name in last:
            run.note(f"{title}: {first[name]:.3f} -> {last[name]:.3f}")
    run.note(f"{target.name}: {target}")


def _paths(paths: DataPaths) -> list[str]:
    listed = paths if isinstance(paths, list) else [paths]
    return [name for path in listed for name in ([path] if isinstance(path, str) else path)]


def _held_out_metrics(folder: RunFolder) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation in metrics.jsonl, which holds null where a number was not finite."""
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [
        {name: math.nan if value is None else value for name, value in line.items() if name.startswith("eval/")}
        for line in lines
    ]
    evaluations = [values for values in evaluations if values] or [{}]
    return evaluations[0], evaluations[-1]
