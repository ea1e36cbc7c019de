"""The weights that training starts from: read, or drawn at random, with an adapter merged into them, quantised."""

import errno
import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from qwen_train.config import SFTConfig
from qwen_train.data.scratch import scratch_folder, sync_folder
from qwen_train.model.adapters import check_base, first_of, merge_adapter
from qwen_train.model.memory import Shape

DENSE_SHARE = 0.8
"""Of a card's memory, what weights may take in bfloat16 before they are quantised."""


def base_weights(
    config: SFTConfig,
    model_config: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    base: Path | None,
    is_main: bool,
    on_cpu: bool,
) -> PreTrainedModel:
    """The model before the adapter that is trained; `base` and `is_main` are `load_model`'s.

    `on_cpu`: weights that are read stay in CPU memory. Raises ValueError for what the user can mend.
    """
    draws = config.model.from_scratch and (base is None or not base.exists())
    place = place_of_weights(config, model_config, device, base, draws, on_cpu)
    if draws:
        lm = _draw(config, model_config, place)
        if base is not None and is_main and config.lora.enabled:
            _write_base(lm, tokenizer, base)
    else:
        lm = _read(config, base, place)
    if config.model.adapter is not None:
        check_base(config.model.adapter, config.model.path, config.model.revision)
        if config.model.adapter_start == "merge":
            lm = merge_adapter(lm, config.model.adapter)
    if config.model.quantization == "nf4" and not getattr(lm, "is_loaded_in_4bit", False):
        quantize_nf4(lm, device)
    return lm


def place_of_weights(
    config: SFTConfig, model_config: Any, device: torch.device, base: Path | None, draws: bool, on_cpu: bool = False
) -> torch.device:
    """Where the weights are read or drawn: on `device`, or beside it if they are quantised only when they are whole.

    So are a merge start and random weights of NF4, whose card need not hold the model in bfloat16. They stay on a card
    that can: each process of a machine would hold them in its memory, and drawing takes minutes there (20 million a
    second). Random weights that nobody keeps are nowhere yet (meta): `quantize_nf4` draws them layer by layer.
    """
    if on_cpu and not draws:
        return torch.device("cpu")
    if config.model.quantization == "nf4" and draws and base is None:
        return torch.device("meta")
    if config.model.quantization != "nf4" or not (draws or config.model.merges) or device.type != "cuda":
        return device
    room = DENSE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return device if 2 * Shape.of(model_config).parameters <= room else torch.device("cpu")


# Drawn ----------------------------------------------------------------------------------------------------------------


def _draw(config: SFTConfig, model_config: Any, place: torch.device) -> PreTrainedModel:
    torch.manual_seed(config.run.seed)
    with place:
        return AutoModelForCausalLM.from_config(
            model_config, dtype=getattr(torch, config.model.dtype), attn_implementation="sdpa"
        )


def _write_base(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: Path) -> None:
    """Write the random weights of a `from_scratch` run, whole or not at all: its adapter is worth nothing without."""
    disable_progress_bar()
    try:
        with scratch_folder(base) as unfinished:
            lm.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            for path in unfinished.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            sync_folder(unfinished)
            os.replace(unfinished, base)
            sync_folder(base.parent)
    except SafetensorError as error:  # of the disk, in the words of a library that does not know OSError
        number = int(match[1]) if (match := re.search(r"\(os error (\d+)\)", str(error))) else errno.EIO
        raise OSError(number, f"the base could not be written: {error}", str(base)) from None


# Read -----------------------------------------------------------------------------------------------------------------


def _read(config: SFTConfig, base: Path | None, place: torch.device) -> PreTrainedModel:
    path = str(base) if config.model.from_scratch else config.model.path
    try:
        return read_weights(
            path,
            revision=None if config.model.from_scratch else config.model.revision,
            dtype=getattr(torch, config.model.dtype),
            device_map={"": place},
            trust_remote_code=config.model.trust_remote_code,
            quantization_config=_nf4_config(config),
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: cannot read weights from {path}: {first_line(error)}; check the files, or set "
            "model.from_scratch for random weights"
        ) from None


def read_weights(path: str, **options: Any) -> PreTrainedModel:
    """A model by transformers' `from_pretrained`, of which every weight was in the files, and every one there is used.

    transformers draws at random what is missing or of another shape, and goes on. Raises ValueError, and OSError.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be refused here, by name
            **options,
        )
    except SafetensorError as error:  # of a file that was cut off, or is git-lfs's pointer to one
        raise ValueError(f"a .safetensors file is damaged ({first_line(error)})") from None
    lm, report = loaded
    others = [name for name, *_ in report["mismatched_keys"]]
    for name, layer in lm.named_modules():  # of a quantised weight nobody has compared the shapes
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (layer.out_features, layer.in_features):
            others.append(f"{name}.weight")
    for names, fault in (
        (report["missing_keys"], "is missing"),
        (others, "has another shape than its config.json says"),
        (report["unexpected_keys"], "has no place in the model of its config.json"),
    ):
        if names:
            raise ValueError(f"{first_of(names)} {fault}")
    return cast(PreTrainedModel, lm)


def first_line(error: Exception) -> str:
    """Of another library's error; the rest is advice to its own users."""
    return str(error).strip().split("\n")[0]


# Quantised ------------------------------------------------------------------------------------------------------------


def _nf4_config(config: SFTConfig) -> BitsAndBytesConfig | None:
    """How transformers quantises while it loads; a merge start is quantised after the merge, by `quantize_nf4`."""
    if config.model.quantization != "nf4" or config.model.merges:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def quantize_nf4(lm: PreTrainedModel, device: torch.device) -> None:
    """Quantise the decoder's linear layers in place, each on its way to `device`, and bring the rest there as it is.

    What is on the meta device is drawn at random first, a layer at a time.
    """
    import bitsandbytes as bnb  # costs seconds, and only this mode needs it

    drawn = lm.device.type == "meta"
    for layer in lm.model.layers:
        if drawn:
            layer.to_empty(device=device).apply(lm._init_weights)
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                new = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                    device="meta",
                )
                weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                new.weight = weight.to(device)  # type: ignore[misc]  # quantises
                new.bias = linear.bias
                layer.set_submodule(name, new)
    if drawn:
        for module in (lm.model.embed_tokens, lm.model.norm, lm.lm_head):
            module.to_empty(device=device).apply(lm._init_weights)
        lm.tie_weights()
        compute_rotary(lm, device)
    lm.to(device)  # type: ignore[arg-type]
    lm.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT asks


def compute_rotary(lm: PreTrainedModel, device: torch.device) -> None:
    """Give a model made on the meta device its rotary table, which no file holds."""
    rotary: Any = type(lm.model.rotary_emb)
    with device:
        lm.model.rotary_emb = rotary(lm.config)
