"""The end of a run: its adapter or model folder, its card, its last word."""

import importlib.metadata
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwen_train.config import SFTConfig, as_dict
from qwen_train.data.packing import Batch
from qwen_train.data.sources import resolve_paths
from qwen_train.model.packed import PackedLM, trainable_parameters
from qwen_train.output.export import CardKind, shown_path, write_adapter, write_full_model, write_model_card
from qwen_train.output.merge import score, write_delta, write_joined
from qwen_train.train.distributed import Run
from qwen_train.train.folder import RunFolder
from qwen_train.train.progress import ANSWERS, Progress, require_finite
from qwen_train.train.status import write_status

LAST_WORDS = {
    "eval/loss": ("held-out loss", ("data.eval",)),
    "eval/logps/accuracies": ("held-out preference accuracy (chosen is the likelier answer)", ("data.eval",)),
    "eval/rewards/accuracies": ("held-out reward accuracy (chosen gained more since the start)", ("data.eval",)),
    "eval/exact_match": ("right answers", ("data.eval", ANSWERS)),
    "eval/sft/exact_match": ("right answers of the SFT evaluation", ("data.eval_sft", ANSWERS)),
}
"""What a run says of itself in the end: metric, and what it is of (`Progress.held_out`); before -> after."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Nats a token by which what is handed over may differ from what was trained: ten times what rounding does."""
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
    Raises ValueError for weights that are not finite.
    """
    require_finite(run, folder, model)
    tensors = run.whole(trainable_parameters(model))
    start = config.model.adapter if config.lora.enabled and config.model.merges else None
    expected = score(model, probe) if start is not None else None
    if not run.is_main:
        return
    base_name = str(folder.base) if config.model.from_scratch else config.model.path
    base_sha256 = progress.start.get("model.path", "")  # of what training began with; none if it drew all its weights
    if not isinstance(model.lm, PeftModel):
        result = _full_model(folder.path / "model", model, tensors, tokenizer, config)
    elif start is None:
        result = _adapter(folder.path / "adapter", model.lm, tensors, tokenizer, config, base_name, base_sha256)
    else:
        assert expected is not None
        result = _joined(folder.path, start, model, tensors, tokenizer, config, base_name, base_sha256, probe, expected)
    evaluations = _evaluations(folder)
    card: dict[str, Any] = {
        "kind": result.kind,
        "method": "SFT" if type(config) is SFTConfig else "DPO",
        "base_name": base_name,
        "config": as_dict(config),
        "facts": {
            "steps": progress.step,
            "tokens": progress.num_tokens,
            "skipped steps": progress.skipped,
            "processes": run.world_size,
            **{package: importlib.metadata.version(package) for package in PACKAGES},
            **result.facts,
        },
        "metrics": evaluations.get(progress.step, {}),
        "datasets": [source.path for source in resolve_paths(config.data.train)],
        "lora": result.lora,
        "name": config.run.name,
    }
    write_model_card(result.folder, **card)
    write_model_card(folder.path, weights=result.folder.name, **card)
    write_status(folder.path, "finished", step=progress.step, result=str(result.folder))
    run.note(*result.notes)
    run.note(*_last_words(evaluations, progress), f"{result.folder.name}: {result.folder}")


@dataclass(frozen=True)
class _Result:
    """A folder that was written, and what its card says of it."""

    folder: Path
    kind: CardKind
    lora: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _full_model(
    folder: Path, model: PackedLM, tensors: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, config: SFTConfig
) -> _Result:
    write_full_model(folder, model.causal_lm, tensors, tokenizer, dtype=getattr(torch, config.model.dtype))
    return _Result(folder, "full")


def _adapter(
    folder: Path,
    lm: PeftModel,
    tensors: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    base_name: str,
    base_sha256: str,
) -> _Result:
    write_adapter(folder, lm, tensors, tokenizer, base_name, {"base_sha256": base_sha256, "base": base_name})
    return _Result(folder, "adapter", {"r": config.lora.r, "use_dora": config.lora.use_dora})


def _joined(
    run_folder: Path,
    start: str,
    model: PackedLM,
    tensors: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    base_name: str,
    base_sha256: str,
    probe: Batch,
    expected: Tensor,
) -> _Result:
    """The merged start and this run as one, in `adapter/` (`model/` where adapters cannot be joined), with a proof."""
    assert isinstance(model.lm, PeftModel)
    delta, target = run_folder / "adapter_delta", run_folder / "adapter"
    write_delta(delta, start, base_name, base_sha256, model.lm, tensors, tokenizer)
    tolerance = TOLERANCE[config.model.dtype] if config.model.quantization == "none" else math.inf
    joined = write_joined(start, delta, target, base_name, model, tokenizer, probe, expected, tolerance)
    facts = {
        "start": f"{shown_path(start)}, merged",
        "as written against as trained (nats a token)": str(joined.difference),
    }
    if joined.r is None:
        return _Result(joined.folder, "merged", None, facts, (joined.note,))
    own = config.lora.r
    facts["rank"] = f"{joined.r}: {joined.r - own} of the start and {own} of this run"
    return _Result(joined.folder, "adapter", {"r": joined.r, "use_dora": False}, facts, (joined.note,))


def _evaluations(folder: RunFolder) -> dict[int, dict[str, float]]:
    """The evaluations in metrics.jsonl, by step, in their order; the file holds null where a number was not finite."""
    evaluations = {}
    for text in (folder.path / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        values = {name: line[name] for name in line if name.startswith("eval/")}
        if values:
            evaluations[line["step"]] = {name: math.nan if value is None else value for name, value in values.items()}
    return evaluations


def _last_words(evaluations: dict[int, dict[str, float]], progress: Progress) -> list[str]:
    """What came of the run, a line a metric: its last value, and its first of the same held-out data if there is one.

    The last value is of the weights that are handed over, or there is no line.
    """
    lines = []
    for name, (title, splits) in LAST_WORDS.items():
        since = max(progress.held_out_since.get(split, 0) for split in splits)
        values = {step: values[name] for step, values in evaluations.items() if name in values and step >= since}
        if progress.step in values:
            first = f"{values[min(values)]:.3f} -> " if len(values) > 1 else ""
            changed = f" (what is evaluated changed at step {since})" if since else ""
            lines.append(f"{title}: {first}{values[progress.step]:.3f}{changed}")
    return lines
