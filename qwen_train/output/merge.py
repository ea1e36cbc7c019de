"""Adapters into weights, and two adapters into one: each result is read back from the disk and measured.

`merge` is launch/merge.py; `write_joined` ends a DPO run that started from a merged SFT adapter.

Letters: S supervised tokens.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from qwen_train.config import Kind, ModelConfig
from qwen_train.data.chat import ChatOptions, EncodedConversation, EncodedPreference, Template
from qwen_train.data.packing import Batch, pack_sequences, supervised_answer
from qwen_train.data.tokenize import JudgedRow, judge
from qwen_train.model.adapters import (
    adapter_sha256,
    check_base,
    concatenate_adapters,
    find_base,
    load_adapter,
    merge_adapter,
    merge_loaded,
    read_adapter_config,
    read_base,
    without_adapters,
)
from qwen_train.model.load import load_model_config, special_tokens
from qwen_train.model.memory import Shape
from qwen_train.model.packed import PackedLM, evaluating
from qwen_train.model.weights import read_weights
from qwen_train.output.export import shown_path, write_adapter, write_full_model, write_model_card

if TYPE_CHECKING:
    from peft import PeftModel

MAX_ROWS = 8
PROMPTS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Write a short poem about rivers.",
    "Explain in two sentences why the sky is blue.",
)
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Difference:
    """How far two models' log-probabilities lie apart, nats a token."""

    mean: float
    largest: float
    tokens: int

    @classmethod
    def between(cls, left: Tensor, right: Tensor) -> "Difference":
        difference = (left.double().cpu() - right.double().cpu()).abs()
        return cls(float(difference.mean()), float(difference.max()), difference.numel())

    def __str__(self) -> str:
        return f"{self.mean:.2e} nats a token on average, {self.largest:.2e} at most, over {self.tokens:,} tokens"


@torch.no_grad()
def score(model: PackedLM, batch: Batch) -> Tensor:
    """Log-probabilities [S], in evaluation mode, on the CPU."""
    with evaluating(model):
        return model(batch.to(model.causal_lm.lm_head.weight.device)).logps.cpu()


def load_plainly(path: str, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """A model as transformers reads it. Raises ValueError where it cannot."""
    disable_progress_bar()
    try:
        return read_weights(path, dtype=dtype, device_map={"": device})
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: cannot be read as a model: {reason}; give the base of the adapter") from None


def packed(lm: "PreTrainedModel | PeftModel", tokenizer: PreTrainedTokenizerBase) -> PackedLM:
    """The wrapper around a plainly loaded model, uncompiled, on the reference attention."""
    end, pad = special_tokens(tokenizer, lm.config.model_type)
    return PackedLM(lm, "sdpa", 4096, end, pad, max_length=0).eval()


def device_with_room(device: torch.device, model_config: Any, dtype: torch.dtype | str) -> torch.device:
    """`device` if the model fits into what is free there, else the CPU; `dtype` may be "auto", the config's own."""
    if device.type != "cuda":
        return device
    stored = (model_config.dtype or torch.float32) if isinstance(dtype, str) else dtype
    needed = (stored.itemsize + 0.5) * Shape.of(model_config).parameters  # and half a byte for activations
    return device if torch.cuda.mem_get_info(device)[0] > needed else torch.device("cpu")


# SFT and DPO as one adapter ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """What `write_joined` wrote."""

    folder: Path
    difference: Difference
    note: str
    r: int | None
    """Rank of the joined adapter; None: a merged model was written."""


def write_joined(
    start: str,
    delta: Path,
    target: Path,
    base: str,
    trained: PackedLM,
    tokenizer: PreTrainedTokenizerBase,
    probe: Batch,
    expected: Tensor,
    tolerance: float,
) -> Joined:
    """Write SFT and DPO, `start` and `delta`, as one adapter `target` of the original base.

    The delta alone on that base would be another model. What cannot be concatenated (DoRA, saved modules) becomes a
    merged model `model/` beside it. `expected` [S]: the trained policy's log-probabilities of `probe`; the result is
    loaded from the disk as anybody would and compared. Raises ValueError where it differs by more than `tolerance`
    (mean nats a token): better nothing than another model. One process calls it.
    """
    head = trained.causal_lm.lm_head.weight
    dtype = head.dtype
    lm = load_plainly(base, dtype, device_with_room(head.device, trained.causal_lm.config, dtype))
    try:
        joined = concatenate_adapters(lm, [start, delta])
    except ValueError as error:
        reason = str(error)
    else:
        r = joined.peft_config["default"].r  # type: ignore[attr-defined]
        of_base = {"base_sha256": read_base(delta)["original_base_sha256"], "base": base}
        write_adapter(target, joined, None, tokenizer, base, of_base)
        model = packed(load_adapter(without_adapters(joined), target), tokenizer)
        difference = Difference.between(score(model, probe), expected)
        if difference.mean <= tolerance:
            what = f"{target.name}/: {start} and this run as one adapter of {base}, rank {r}"
            return Joined(target, difference, f"{what}; differs from the trained policy by {difference}", r)
        reason = f"as one adapter they differ from the trained policy by {difference}"
        shutil.rmtree(target)
    folder = target.with_name("model")
    merged = merge_adapter(merge_adapter(load_plainly(base, dtype, lm.device), start), delta)
    write_full_model(folder, merged, None, tokenizer, dtype=None)
    del merged
    model = packed(load_plainly(str(folder), dtype, lm.device), tokenizer)
    difference = Difference.between(score(model, probe), expected)
    if not difference.mean <= tolerance:
        shutil.rmtree(folder)
        raise ValueError(
            f"model.adapter: {start} and this run together are not the trained policy ({difference}), neither as one "
            f"adapter nor merged; the run's part alone is {delta}, and the checkpoints are intact"
        )
    note = f"{folder.name}/: a merged model, since {reason}; differs from the trained policy by {difference}"
    return Joined(folder, difference, note, None)


def write_delta(
    delta: Path,
    start: str,
    base: str,
    base_sha256: str,
    trained: "PeftModel",
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the adapter that was trained on the merged start, and what it belongs on."""
    place = f"{base} with {start} merged into it"
    card = (
        f"# This run's part alone\n\nTrained on `{Path(base).name}` with another adapter merged into it. On the base "
        "alone it is another model: load `../adapter` there, which holds both.\n"
    )
    merged = {"adapter": start, "adapter_sha256": adapter_sha256(start)}
    of_base = {"original_base_sha256": base_sha256, "merged": merged}
    write_adapter(delta, trained, tensors, tokenizer, place, of_base, card=card)


# launch/merge.py -----------------------------------------------------------------------------------------------------


def merge(adapter: str, out: str, base: str | None = None, rows: str | None = None, dtype: str = "auto") -> Difference:
    """Write the base with the adapter merged into it as a Hugging Face folder, and measure what is on the disk.

    `rows`: conversations or pairs to measure on, of which the first 8 are taken; without, the model's own answers to
    four questions. `dtype`: auto (the base's), bfloat16 or float32. Raises ValueError for what the user can mend.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--out: {out} exists already; give a new folder")
    config = read_adapter_config(adapter)
    start = read_base(adapter).get("merged", {}).get("adapter")
    if base is None and start is not None:
        both = Path(adapter).parent / "adapter"
        raise ValueError(
            f"--adapter: {adapter} was trained on a base with {start} merged into it; give --base <folder of that "
            f"merge>, or take {both if both.exists() else 'the adapter/ beside it'}, which holds both"
        )
    path = base or find_base(adapter)
    if path is None:
        raise ValueError(
            f"--base: the base that {adapter} names, {config.base_model_name_or_path}, is not there; say where it is"
        )
    check_base(adapter, path)
    tokenizer = AutoTokenizer.from_pretrained(adapter if (Path(adapter) / "tokenizer.json").exists() else path)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device_with_room(device, load_model_config(ModelConfig(path=path)), chosen)

    lm = load_adapter(load_plainly(path, chosen, device), adapter)
    model = packed(lm, tokenizer)
    batch = _given_rows(rows, tokenizer) if rows else _own_answers(model, tokenizer)
    before = score(model, batch)
    merged = merge_loaded(lm, adapter)
    merged.set_attn_implementation("sdpa")
    write_full_model(target, merged, None, tokenizer, dtype=None)
    del lm, model, merged

    after = score(packed(load_plainly(out, chosen, device), tokenizer), batch)
    difference = Difference.between(before, after)
    write_model_card(target, **_card(adapter, path, config, difference))
    return difference


def _given_rows(path: str, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The first rows of a file, conversations or pairs, as one batch."""
    options = ChatOptions(max_length=4096)
    problems = []
    kinds: tuple[Kind, ...] = ("sft", "dpo")
    for kind in kinds:
        judged: list[JudgedRow] = []
        for row in judge(kind, path, tokenizer, options, name="--rows"):
            judged.append(row)
            if len(judged) == MAX_ROWS:
                break
        sequences = [sequence for row in judged for sequence in _sequences(row.encoded)]
        if sequences:
            return pack_sequences(sequences, range(len(sequences)))
        problems += [f"{row.place}: {row.message}" for row in judged[:1]]
    raise ValueError(f"--rows: {path} holds no usable row ({'; '.join(problems)}); give conversations or pairs")


def _sequences(encoded: EncodedConversation | EncodedPreference | None) -> list[tuple[Any, Any]]:
    if encoded is None:
        return []
    if isinstance(encoded, EncodedConversation):
        return [(np.array(encoded.input_ids), (encoded.weights() > 0).astype(np.float32))]
    return [supervised_answer(encoded.prompt_ids, answer) for answer in (encoded.chosen_ids, encoded.rejected_ids)]


def _own_answers(model: PackedLM, tokenizer: PreTrainedTokenizerBase) -> Batch:
    template = Template(tokenizer)
    prompts = [template.prompt_ids([{"role": "user", "content": text}], None, ChatOptions()) for text in PROMPTS]
    answers = model.sample(prompts, ANSWER_TOKENS)
    sequences = [supervised_answer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return pack_sequences(sequences, range(len(sequences)))


def _method(adapter: str) -> str:
    """How the adapter was trained, as its run's config tells."""
    config = Path(adapter).parent / "config.yaml"
    if not config.exists():
        return "LoRA"
    return "DPO" if "loss" in yaml.safe_load(config.read_text()) else "SFT"


def _card(adapter: str, base: str, config: Any, difference: Difference) -> dict[str, Any]:
    return {
        "kind": "merged",
        "method": _method(adapter),
        "base_name": base,
        "config": {"adapter": {"r": config.r, "lora_alpha": config.lora_alpha, "use_dora": config.use_dora}},
        "facts": {
            "adapter": shown_path(adapter),
            "adapter sha256": adapter_sha256(adapter),
            "merged against adapter, mean difference (nats a token)": f"{difference.mean:.3g}",
            "merged against adapter, largest difference (nats a token)": f"{difference.largest:.3g}",
            "measured on (tokens)": difference.tokens,
        },
        "metrics": {},
    }
