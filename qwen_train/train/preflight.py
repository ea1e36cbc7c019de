"""What can be known to be wrong before any data is read: packages, model folders, the layers that get an adapter."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import has_file

from qwen_train.config import HEADS, DPOConfig, SFTConfig, reference_source
from qwen_train.data.formats import one_line
from qwen_train.data.sources import is_hub_id
from qwen_train.model.load import load_model_config, missing_folder

JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


def preflight(config: SFTConfig) -> None:
    """Refuse (ValueError, one line) what would otherwise end the run after its data are tokenised, or even trained.

    Of hub models it asks the hub for file names and the config, nothing large.
    """
    check_packages(config)
    check_place("model.path", config.model.path, config.model.revision)
    shape = load_model_config(config.model)
    if not config.model.from_scratch:
        _check_weights("model.path", config.model.path, config.model.revision)
    if isinstance(config, DPOConfig) and reference_source(config) == "model" and config.reference.path is not None:
        check_place("reference.path", config.reference.path, None)
        _check_weights("reference.path", config.reference.path, None)
    if config.lora.enabled and not config.model.continues:
        _check_targets(config, shape)


def check_packages(config: SFTConfig) -> None:
    """Refuse (ValueError) what needs a package that cannot be imported."""
    if config.model.quantization == "nf4":
        _check_bitsandbytes("model.quantization: nf4")
    if config.optim.name == "adamw_8bit":
        _check_bitsandbytes("optim.name: adamw_8bit")


def _check_bitsandbytes(asked: str) -> None:
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"{asked} needs bitsandbytes, which cannot be imported ({error}); pip install bitsandbytes"
        ) from None


def check_place(field: str, path: str, revision: str | None, needed: str = "config.json") -> None:
    """Refuse (ValueError) a model that can be neither a folder here nor had from the hub; `needed`: a file of it."""
    _check_folder(field, path)
    _check_hub(field, path, revision, needed)


def _check_folder(field: str, path: str) -> None:
    """A folder whose JSON files are readable, or at least a possible hub id."""
    folder = Path(path)
    if folder.is_dir():
        for file in (folder / name for name in JSON_FILES if (folder / name).exists()):
            try:
                content = json.loads(file.read_bytes())
            except (OSError, ValueError) as error:
                raise ValueError(f"{field}: {file} cannot be read: {error}; copy the model's file again") from None
            if not isinstance(content, dict):
                raise ValueError(
                    f"{field}: {file} holds a {type(content).__name__} and not an object; copy the model's file again"
                )
    elif folder.exists():
        raise ValueError(f"{field}: {path} is a file; give the folder of the model")
    elif not is_hub_id(path):
        raise ValueError(f"{field}: the folder {path} does not exist; give a model's folder or hub id")


def _check_hub(field: str, path: str, revision: str | None, needed: str) -> None:
    """The hub can be reached for a model that is not here: asked once, where a download would try for half a minute."""
    if Path(path).is_dir():
        return
    try:
        if not isinstance(try_to_load_from_cache(path, needed, revision=revision), str):
            get_hf_file_metadata(hf_hub_url(path, needed, revision=revision), timeout=10)
    except (HfHubHTTPError, OfflineModeIsEnabled, HFValidationError):
        return  # an answer, nobody to ask, or no hub id: what that means is said where the file is read
    except Exception as error:  # connection, proxy, certificate: their types are of whatever the hub's client uses
        if missing := missing_folder(path):
            raise ValueError(f"{field}: {missing}") from None
        raise ValueError(
            f"{field}: {path} is not a folder here, its {needed} is not in the hub's cache, and the hub could not be "
            f"reached ({one_line(error)}); give a model's folder, or check the connection"
        ) from None


def _check_weights(field: str, path: str, revision: str | None) -> None:
    """Weights as safetensors: others are pickles, which run code when they are opened, and never are here."""

    def has(*names: str) -> bool:
        try:
            return any(has_file(path, name, revision=revision) for name in names)
        except OSError as error:
            raise ValueError(f"{field}: {str(error).strip().splitlines()[0]}; give another model or revision") from None

    if has(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        return
    if has(WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        raise ValueError(
            f"{field}: {path} has its weights as {WEIGHTS_NAME}, a pickle, which can run code and is not opened here; "
            "where you trust it, convert it with transformers: from_pretrained(...).save_pretrained(another folder)"
        )
    remedy = "check the path, or set model.from_scratch for random weights"
    if not Path(path).is_dir():
        remedy = "the hub could not be reached and its cache here has none, or the model has none; give a folder"
    raise ValueError(f"{field}: no weights ({SAFE_WEIGHTS_NAME}) in {path}; {remedy}")


def _check_targets(config: SFTConfig, shape: Any) -> None:
    """Every name of lora.target_modules is that of linear layers, by a model without memory."""
    targets = config.lora.target_modules
    if targets == "all-linear":
        return
    with torch.device("meta"):
        lm: nn.Module = AutoModelForCausalLM.from_config(shape)
    layers = dict(lm.named_modules())
    linear = sorted({name.split(".")[-1] for name, layer in layers.items() if isinstance(layer, nn.Linear)} - {*HEADS})
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):  # for PEFT a single text is a pattern of whole names
            found = [name for name in layers if re.fullmatch(target, name)]
        else:
            found = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not found:
            remedy = f"write [{target}]" if target in linear else f"there are {', '.join(linear)}, or say all-linear"
            raise ValueError(f"lora.target_modules: {target} is the name of no layer of {config.model.path}; {remedy}")
        for name in found:
            if not isinstance(layers[name], nn.Linear) or name.split(".")[-1] in HEADS:
                raise ValueError(
                    f"lora.target_modules: {target} also means {name}, a {type(layers[name]).__name__}, which cannot "
                    f"have an adapter; name some of {', '.join(linear)}, or say all-linear"
                )
