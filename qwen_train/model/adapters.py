"""Adapter folders: which base they belong to, merging them into it, a frozen second one, two of them as one."""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from qwen_train.config import HEADS, Config, LoraConfig
from qwen_train.data.digest import json_sha256
from qwen_train.data.formats import one_line
from qwen_train.data.sources import is_hub_id

WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
REFERENCE_ADAPTER = "reference"
REWRITING = ("pissa", "olora", "corda", "loftq")  # initialisations that change the base
SAMPLED_VALUES = 64
HASH_CHUNK = 2**24


# Folders -------------------------------------------------------------------------------------------------------------


def read_adapter_config(folder: str | Path) -> peft.LoraConfig:
    """PEFT's config of an adapter folder.

    Raises ValueError where it is not one, or where its initialisation rewrote the base: without the adapter such a base
    is not what the adapter was trained on, so it can neither be switched off nor be merged into the original.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").exists() or not (path / WEIGHTS).exists():
        raise ValueError(
            f"model.adapter: {folder} is not an adapter folder (adapter_config.json and {WEIGHTS}); "
            "give the adapter/ folder of a run, or leave it out to start from the base"
        )
    try:
        start = str(json.loads((path / "adapter_config.json").read_text()).get("init_lora_weights", True)).lower()
        config = None if start.startswith(REWRITING) else PeftConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"model.adapter: {path / 'adapter_config.json'} cannot be read: {error}") from None
    if config is None:
        raise ValueError(
            f"model.adapter: {folder} was initialised by {start}, which rewrote the base, so switching the adapter "
            "off does not give the base back; convert it to a plain LoRA first (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"model.adapter: {folder} is an adapter of type {config.peft_type}; give a LoRA adapter")
    return config


def adapter_sha256(folder: str | Path) -> str:
    """One hash over an adapter's weights and config."""
    digest = hashlib.sha256()
    for name in (WEIGHTS, "adapter_config.json"):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()


def read_base(folder: str | Path) -> dict[str, Any]:
    """What base.json says of an adapter's base; empty for an adapter of another tool."""
    path = Path(folder) / BASE
    return json.loads(path.read_text()) if path.exists() else {}


def find_base(folder: str | Path) -> str | None:
    """The base that an adapter names: a folder, a hub id, or for a run that was moved the base beside the adapter.

    Where a whole project was moved, the folder is looked for by the name it had in the working directory.
    """
    named = read_adapter_config(folder).base_model_name_or_path or ""
    beside = Path(folder).absolute().parent / "base"
    for place in (named, beside, read_base(folder).get("base")):
        if place and Path(place).exists():
            return str(place)
    return str(named) if "/" in named and is_hub_id(named) else None


def resolve_start(config: Config) -> tuple[Config, list[str]]:
    """The config with the base of `model.adapter` as its `model.path`, and what a person should hear of the start.

    An adapter that training continues brings its own rank and so on, as `lora`. The base is the one that the adapter's
    config names; a run folder that was moved has it beside the adapter. A `model.path` with weights of its own must be
    that base by hash. Raises ValueError.
    """
    folder = config.model.adapter
    if folder is None:
        weights = "random weights of" if config.model.from_scratch else "the base,"
        return config, [f"start: {weights} {config.model.path}"]
    own = read_adapter_config(folder)
    if config.model.from_scratch:
        raise ValueError(
            f"model.from_scratch: random weights are not the base of an adapter, got model.adapter {folder}; leave one "
            "of them out"
        )
    given, revision = config.model.path, config.model.revision
    named = find_base(folder)
    if named is None or (given != named and _weight_files(given, revision)):
        check_base(folder, given, revision)
        named = given
    continues = config.model.continues
    if continues:
        try:
            config = dataclasses.replace(config, lora=_lora_of(own))
        except ValueError as error:
            raise ValueError(
                f"model.adapter: {folder} cannot be continued ({error}); use adapter_start merge"
            ) from None
        if config.model.quantization == "fp8" and config.lora.beyond_plain:
            raise ValueError(
                f"model.adapter: {folder} has {config.lora.beyond_plain}, and an fp8 base takes plain LoRA only; use "
                "adapter_start merge, or quantization nf4 or none"
            )
    if named != given:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=named, revision=None))
    return config, [f"start: {folder}, {'to be continued' if continues else 'merged'}, on {named}"]


def _lora_of(own: peft.LoraConfig) -> LoraConfig:
    """An adapter's own settings as ours."""
    targets = own.target_modules or "all-linear"
    return LoraConfig(
        r=own.r,
        alpha=float(own.lora_alpha),
        dropout=float(own.lora_dropout),
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        use_rslora=own.use_rslora,
        use_dora=own.use_dora,
    )


def check_base(folder: str, path: str, revision: str | None = None) -> None:
    """Refuse (ValueError) the weights at `path` if base.json tells that the adapter was trained on others."""
    base = read_base(folder)
    if "merged" in base and base["original_base_sha256"] == base_fingerprint(path, revision):
        raise ValueError(
            f"model.path: {folder} was trained on {path} with {base['merged']['adapter']} merged into it; give the "
            "folder of that merge (launch/merge.py), or the adapter/ beside it, which holds both"
        )
    if "base_sha256" in base and base["base_sha256"] != base_fingerprint(path, revision):
        raise ValueError(
            f"model.path: {path} is not the base that {folder} was trained on (the weights differ); give that base, "
            f"{read_adapter_config(folder).base_model_name_or_path}, or another adapter; a training with "
            "--model.adapter null starts from model.path alone"
        )


def check_template(folder: str, template: str | None) -> None:
    """Refuse (ValueError) an adapter that was trained with another chat template than `template`."""
    path = Path(folder) / "chat_template.jinja"
    if path.exists() and path.read_text().strip() != (template or "").strip():
        raise ValueError(
            f"model.adapter: {path} differs from the chat template of model.path's tokenizer, so the adapter would see "
            "prompts it was not trained on; put that template into the model's folder, or take another adapter"
        )


# Fingerprints --------------------------------------------------------------------------------------------------------


def _weight_files(path: str, revision: str | None = None) -> list[str]:
    """Safetensors files of a model folder, or of a hub id among the downloaded ones; none if there are none."""
    local: dict[str, Any] = {
        "revision": revision,
        "local_files_only": True,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **local) if _may_hold(path, SAFE_WEIGHTS_INDEX_NAME) else None
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        return [str(Path(index).parent / name) for name in names]
    single = cached_file(path, SAFE_WEIGHTS_NAME, **local) if _may_hold(path, SAFE_WEIGHTS_NAME) else None
    return [] if single is None else [single]


def _may_hold(path: str, name: str) -> bool:
    return not Path(path).is_dir() or (Path(path) / name).exists()


def base_fingerprint(path: str, revision: str | None = None) -> str:
    """sha256 over the shapes and 64 sampled values of every tensor of a model on disk: tells one base from another.

    Taken from the files, so a quantised run and one in another dtype agree; a merged adapter changes every linear.
    Raises ValueError where there are no safetensors files.
    """
    files = _weight_files(path, revision)
    if not files:
        raise ValueError(f"model.path: {path} holds no safetensors weights; give a model folder or a hub id")
    stats = [(file, os.stat(file)) for file in files]
    return _fingerprint(tuple((file, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@functools.cache  # asked for the check of an adapter's base, and for the start that a run notes down
def _fingerprint(files: tuple[tuple[str, int, int, int], ...]) -> str:
    """`base_fingerprint` of files, each with what changes when it is written again."""
    entries = {}
    for file, *_ in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                entries[name] = _sampled(tensors, name)
    return json_sha256(entries)


def _sampled(file: Any, name: str) -> list[Any]:
    """The shape and evenly spaced values of a tensor of a file, in bf16's precision; of a matrix reads their rows."""
    stored = file.get_slice(name)
    shape = stored.get_shape()
    count = math.prod(shape)
    index = torch.linspace(0, count - 1, min(SAMPLED_VALUES, count), dtype=torch.float64).long()
    if len(shape) == 2 and count:
        places = [divmod(place, shape[1]) for place in index.tolist()]
        values = torch.stack([stored[row : row + 1][0, column] for row, column in places])
    else:
        values = file.get_tensor(name).reshape(-1)[index]
    return [shape, values.to(torch.bfloat16).float().tolist()]


@torch.no_grad()
def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over every bit of the tensors where they lie, by two sums of their words modulo 2^64."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().contiguous().reshape(-1)
        words = flat.view(torch.int16 if flat.element_size() % 2 == 0 else torch.int8)
        plain = weighted = 0
        for start in range(0, words.numel(), HASH_CHUNK):
            chunk = words[start : start + HASH_CHUNK].long()
            places = torch.arange(start, start + len(chunk), device=chunk.device) % 65_521 + 1
            plain += int(chunk.sum())
            weighted += int((chunk * places).sum())
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), plain, weighted]).encode())
    return digest.hexdigest()


# Models --------------------------------------------------------------------------------------------------------------


def load_adapter(
    lm: PreTrainedModel | PeftModel, folder: str | Path, name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """The base, or one with adapters already, with the adapter of a folder on it: all of it, and nothing else.

    PEFT draws at random what the file lacks and leaves out what has no place, with no more than a warning. Raises
    ValueError.
    """
    read_adapter_config(folder)
    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
        if isinstance(lm, PeftModel):
            lm.load_adapter(str(folder), name, is_trainable=is_trainable)
            model = lm
        else:
            model = PeftModel.from_pretrained(lm, str(folder), adapter_name=name, is_trainable=is_trainable)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except KeyError as error:  # a saved module or token that the file lacks
        others = {str(error.args[0])}
    except (SafetensorError, RuntimeError, ValueError) as error:  # cut off; of another shape; of layers not in the base
        raise ValueError(
            f"model.adapter: {folder} cannot be loaded ({one_line(error)}); give the base that it was trained on, or "
            "copy the adapter again"
        ) from None
    else:
        state = model.state_dict()
        own = get_peft_model_state_dict(model, state, name, save_embedding_layers=False).keys()
        others = (own - stored) | (stored - own - state.keys())  # tensors of the base may have been saved as well
    if others:
        raise ValueError(
            f"model.adapter: {folder} and its base do not fit: {first_of(others)} is in one of them only; give the "
            "base that the adapter was trained on, or copy the adapter again"
        )
    return model


def first_of(names: Collection[str]) -> str:
    """The first of names in their order, and how many more there are."""
    return f"{min(names)} (and {len(names) - 1} more)" if len(names) > 1 else min(names)


def merge_adapter(lm: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The base with the adapter's update added to its weights, in the weights' own type.

    Raises ValueError where that is not what the adapter says: PEFT cannot, or the head is also the embedding.
    """
    return merge_loaded(load_adapter(lm, folder), folder)


def merge_loaded(model: PeftModel, folder: str | Path) -> PreTrainedModel:
    """`merge_adapter` of a model that has the adapter of that folder on it."""
    base: Any = model.get_base_model()
    changed = {
        name.rsplit(".", 1)[-1]
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer | ModulesToSaveWrapper)
    }
    if base.config.tie_word_embeddings and changed & set(HEADS):
        raise ValueError(
            f"model.adapter: {folder} changes the head or the embedding, which are one tensor in this base: merged, it "
            "would change both; give an adapter without them"
        )
    try:
        merged: nn.Module = model.merge_and_unload()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:  # a bias of the adapter's on a layer without one
        raise ValueError(f"model.adapter: {folder} cannot be merged: {error}") from None
    assert isinstance(merged, PreTrainedModel)
    return merged


def concatenate_adapters(lm: PreTrainedModel, folders: Sequence[str | Path]) -> PeftModel:
    """Plain LoRA adapters of one base as one in fp32, whose rank is the sum of theirs.

    [s1 A1; s2 A2] and [B1, B2], on every layer that any of them changes, zeros where one does not: alpha = r is a scale
    of 1. PEFT's `add_weighted_adapter` rounds to the base's type and leaves out what is not A or B, in silence. Raises
    ValueError where an adapter is more than A and B.
    """
    for folder in folders:
        _refuse_more_than_ab(read_adapter_config(folder))
    names = [f"part_{index}" for index in range(len(folders))]
    model = load_adapter(lm, folders[0], names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        load_adapter(model, folder, name)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path, layer in _lora_layers(model):
        if path.endswith(HEADS):  # the one has other matrices, of the other PackedLM reads the weight alone
            raise ValueError(f"adapters of {path} cannot be concatenated")
        own = [name for name in names if name in layer.lora_A]
        scaled = [layer.lora_A[name].weight.float() * layer.scaling[name] for name in own]
        parts[path] = [(a, layer.lora_B[name].weight.float()) for a, name in zip(scaled, own, strict=True)]
    base = without_adapters(model)
    rank = max(sum(a.shape[0] for a, _ in of_layer) for of_layer in parts.values())
    settings: Any = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=_targets(base, set(parts)), task_type="CAUSAL_LM"
    )
    joined = PeftModel(base, settings)
    for path, layer in _lora_layers(joined):
        a, b = layer.lora_A["default"].weight.data.zero_(), layer.lora_B["default"].weight.data.zero_()
        start = 0
        for part_a, part_b in parts.pop(path):
            end = start + part_a.shape[0]
            a[start:end], b[:, start:end] = part_a, part_b
            start = end
    assert not parts, "a layer that is changed has no place in the joined adapter"
    return joined


def can_concatenate(folder: str | Path, lora: LoraConfig) -> bool:
    """Whether `concatenate_adapters` will take an adapter and one that is trained by `lora`."""
    try:
        _refuse_more_than_ab(read_adapter_config(folder))
    except ValueError:
        return False
    return not lora.use_dora


def _lora_layers(model: PeftModel) -> list[tuple[str, Any]]:
    """Name in the base, and layer."""
    return [(path, layer) for path, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)]


def _refuse_more_than_ab(config: peft.LoraConfig) -> None:
    """Raises ValueError for an adapter that has more than A and B."""
    if config.use_dora:
        raise ValueError("DoRA adapters cannot be concatenated")
    for name in (
        "modules_to_save",
        "trainable_token_indices",
        "lora_bias",
        "target_parameters",
        "alora_invocation_tokens",
    ):
        if getattr(config, name):
            raise ValueError(f"adapters with {name} cannot be concatenated")
    if config.bias != "none":
        raise ValueError(f"adapters with bias {config.bias} cannot be concatenated")


def _targets(base: nn.Module, layers: set[str]) -> list[str]:
    """`layers` by their last names, where these mean no other layer of the base."""
    last = {path.rsplit(".", 1)[-1] for path in layers}
    meant = {path for path, _ in base.named_modules() if path.rsplit(".", 1)[-1] in last}
    return sorted(last if meant == layers else layers)


def without_adapters(model: PeftModel) -> PreTrainedModel:
    """The base alone again, untouched."""
    base: nn.Module = model.unload()
    assert isinstance(base, PreTrainedModel)
    return base
