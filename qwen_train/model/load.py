"""Tokenizer, config and weights: `load_model` makes the model of a run, transformers' own with an adapter or without.

It reads or makes the weights, merges or continues an adapter, adds LoRA, and sets up packed attention, compilation and
activation checkpointing.
"""

import errno
import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from qwen_train.config import HEADS, DPOConfig, ModelConfig, SFTConfig
from qwen_train.data.scratch import scratch_folder
from qwen_train.model.adapters import (
    add_reference_adapter,
    check_base,
    check_template,
    merge_adapter,
    read_adapter_config,
)
from qwen_train.model.fuse import fuse_lora, fuse_norms
from qwen_train.model.kernel_check import check_kernels, trusted_attention
from qwen_train.model.memory import Shape
from qwen_train.model.packed import PackedLM

DENSE_SHARE = 0.8
"""Of a card's memory, what weights may take in bfloat16 before they are quantised."""
FAMILIES = {"qwen2": "<|im_end|>", "qwen3": "<|im_end|>"}
"""transformers' model_type of each family that is trained, and the token that ends a turn of it."""


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and config


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ValueError where there is none or it cannot serve chat training."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # tokenizers and transformers raise a dozen types for a damaged file
        raise ValueError(_unreadable("tokenizer", config.path, error)) from None
    if tokenizer.chat_template is None:
        raise ValueError(
            f"model.path: the tokenizer of {config.path} has no chat template; take an Instruct model's tokenizer "
            "or put its chat_template.jinja into the folder"
        )
    if config.adapter is not None:
        check_template(config.adapter, str(tokenizer.chat_template))
    return tokenizer


def load_model_config(config: ModelConfig) -> Any:
    """transformers' config of the model. Raises ValueError for a path without one or another family."""
    try:
        model_config = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(_unreadable("model config", config.path, error)) from None
    if model_config.model_type not in FAMILIES:
        raise ValueError(
            f"model.path: {config.path} is a {model_config.model_type} model; "
            f"this project trains {', '.join(FAMILIES)} (dense Qwen models)"
        )
    if stored := getattr(model_config, "quantization_config", None):
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method.value
        raise ValueError(
            f"model.path: the weights of {config.path} are stored quantised ({method}), which is not read here; give "
            "the model they were made of: model.quantization nf4 and fp8 quantise while loading"
        )
    return model_config


def special_tokens(tokenizer: PreTrainedTokenizerBase, model_type: str) -> tuple[int, int]:
    """(end-of-turn id, pad id). Pad is never the end token, which would then be learnt as padding."""
    end = tokenizer.convert_tokens_to_ids(FAMILIES[model_type])
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if not isinstance(end, int) or not isinstance(pad, int) or end == pad:
        raise ValueError(
            f"model.path: the tokenizer needs {FAMILIES[model_type]} and <|endoftext|>, got ids {end} and "
            f"{pad}; take a Qwen tokenizer"
        )
    return end, pad


def _unreadable(what: str, path: str, error: Exception) -> str:
    if "connect" in str(error):
        return (
            f"model.path: {path} is not a folder here, the hub could not be reached for its {what}, and its cache has "
            "none; give a local folder, or with a cached model set HF_HUB_OFFLINE=1"
        )
    return f"model.path: no {what} in {path}: {_first_line(error).rstrip('.')}; give a model's hub id or folder"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def load_model(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    base: Path | None,
    is_main: bool,
    frozen_copy: bool = False,
    sharded: bool = False,
    frozen: bool = False,
) -> PackedLM:
    """The model of a run on `device`: weights, adapter, attention, compilation, checkpointing.

    `base` is the run's own folder for the weights of a `from_scratch` run: read if it is there, else, when an adapter
    is trained, written by the main process; None for random weights that nobody keeps. `frozen_copy` keeps the adapter
    that training continues a second time, as the reference. `sharded`: for FSDP2 the model stays on the meta device, in
    the types of its shards, and the main process reads the weights beside it (`PackedLM.source`). `frozen`: nothing of
    it is trained (a second model as the reference). Raises ValueError for what the user can mend.
    """
    model_config = load_model_config(config.model)
    end, pad = special_tokens(tokenizer, model_config.model_type)
    dtype = getattr(torch, config.model.dtype)
    attention = trusted_attention(config.model.attention, model_config, device, dtype, config.data.max_length)
    source = None
    if sharded:
        if is_main:
            whole = _adapted(config, model_config, tokenizer, device, base, is_main, frozen_copy, on_cpu=True)
            source = {f"lm.{name}": tensor for name, tensor in whole.state_dict().items()}
        adapted = _empty(config, model_config, device, frozen_copy, frozen)
    else:
        adapted = _adapted(config, model_config, tokenizer, device, base, is_main, frozen_copy)
    if frozen:
        adapted.requires_grad_(False)
    model = PackedLM(
        adapted,
        attention,
        config.model.head_chunk,
        end,
        pad,
        config.data.max_length,
        compiled=config.model.compile,
        dtype=dtype,
        sharded=sharded,
        source=source,
        weighted_sum=not isinstance(config, DPOConfig),
    )
    model.causal_lm.config.use_cache = False

    layers = list(model.causal_lm.model.layers)
    if config.lora.enabled:
        fuse_lora(layers, fp8=config.model.quantization == "fp8", share_storage=not sharded)
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        fuse_norms([*norms, model.causal_lm.model.norm])
    count = config.model.checkpoint_layers
    assert count != "auto", "resolve_auto comes before load_model"
    model.layers.recompute(count)
    if device.type == "cuda":
        check_kernels(model_config, config.model.quantization, config.lora.r, device)
    return model.train()  # transformers loads in evaluation mode


def _adapted(
    config: SFTConfig,
    model_config: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    base: Path | None,
    is_main: bool,
    frozen_copy: bool,
    on_cpu: bool = False,
) -> PreTrainedModel | PeftModel:
    """Base weights, merged adapter, quantisation and the adapter to train; `on_cpu` reads weights into CPU memory."""
    place = place_of_weights(config, model_config, device, base, on_cpu)
    lm = _base_model(config, model_config, tokenizer, place, base, write_base=is_main and config.lora.enabled)
    if config.model.adapter is not None:
        check_base(config.model.adapter, config.model.path, config.model.revision)
        if config.model.adapter_start == "merge":
            lm = merge_adapter(lm, config.model.adapter)
    if config.model.quantization == "nf4" and not getattr(lm, "is_loaded_in_4bit", False):
        quantize_nf4(lm, device)
    return _with_adapter(lm, config, frozen_copy)


def _empty(
    config: SFTConfig, model_config: Any, device: torch.device, frozen_copy: bool, frozen: bool
) -> PreTrainedModel | PeftModel:
    """The same model on the meta device, trained weights in fp32; the rotary table, which no file holds, is real."""
    dtype = getattr(torch, config.model.dtype) if config.lora.enabled or frozen else torch.float32
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation="sdpa")
        adapted = _with_adapter(lm, config, frozen_copy)
    _compute_rotary(lm, device)
    return adapted


def _compute_rotary(lm: PreTrainedModel, device: torch.device) -> None:
    """Give a model made on the meta device its rotary table."""
    rotary: Any = type(lm.model.rotary_emb)
    with device:
        lm.model.rotary_emb = rotary(lm.config)


def _base_model(
    config: SFTConfig,
    model_config: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    base: Path | None,
    write_base: bool,
) -> PreTrainedModel:
    dtype = getattr(torch, config.model.dtype)
    if _draws(config, base):
        torch.manual_seed(config.run.seed)
        with torch.device(device):
            lm = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation="sdpa")
        if write_base and base is not None:
            _write_base(lm, tokenizer, base)
        return lm
    path = str(base) if config.model.from_scratch else config.model.path
    try:
        return read_weights(
            path,
            revision=None if config.model.from_scratch else config.model.revision,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=config.model.trust_remote_code,
            quantization_config=_nf4_config(config),
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: cannot read weights from {path}: {_first_line(error)}; check the files, or set "
            "model.from_scratch for random weights"
        ) from None


def read_weights(path: str, **options: Any) -> PreTrainedModel:
    """A model by transformers' `from_pretrained`, of which every weight was in the files, and every one there is used.

    transformers draws at random what is missing or of another shape, and goes on. Raises ValueError, and OSError.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        attn_implementation="sdpa",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to be refused here, by name
        **options,
    )
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
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{sorted(names)[0]}{more} {fault}")
    return cast(PreTrainedModel, lm)


def place_of_weights(
    config: SFTConfig, model_config: Any, device: torch.device, base: Path | None, on_cpu: bool = False
) -> torch.device:
    """Where the weights are read or drawn: on `device`, or beside it if they are quantised only when they are whole.

    So are a merge start and random weights of NF4, whose card need not hold the model in bfloat16. They stay on a card
    that can: each process of a machine would hold them in its memory, and drawing takes minutes there (20 million a
    second). Random weights that nobody keeps are nowhere yet (meta): `quantize_nf4` draws them layer by layer.
    `on_cpu`: weights are read there.
    """
    draws = _draws(config, base)
    if on_cpu and not draws:
        return torch.device("cpu")
    if config.model.quantization == "nf4" and base is None:
        return torch.device("meta")
    if config.model.quantization != "nf4" or not (draws or config.model.merges) or device.type != "cuda":
        return device
    room = DENSE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return device if 2 * Shape.of(model_config).parameters <= room else torch.device("cpu")


def _draws(config: SFTConfig, base: Path | None) -> bool:
    """Whether the base is drawn at random; otherwise it is read."""
    return config.model.from_scratch and (base is None or not base.exists())


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
        _compute_rotary(lm, device)
    lm.to(device)  # type: ignore[arg-type]
    lm.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT asks


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
            os.replace(unfinished, base)
    except SafetensorError as error:  # of the disk, in the words of a library that does not know OSError
        number = int(match[1]) if (match := re.search(r"\(os error (\d+)\)", str(error))) else errno.EIO
        raise OSError(number, f"the base could not be written: {error}", str(base)) from None


def _check_continued(model: PeftModel, folder: str) -> None:
    """Refuse an adapter of which training would miss a part."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    beyond = [name for name in adapted if name.endswith(HEADS)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    beyond += [name for name in trained if ".lora_" not in name]
    if beyond:
        raise ValueError(
            f"model.adapter_start: {folder} also holds {beyond[0].removeprefix('base_model.model.')}, which training "
            "here does not reach (heads, embeddings, modules_to_save, biases); use adapter_start merge"
        )


def _with_adapter(lm: PreTrainedModel, config: SFTConfig, frozen_copy: bool) -> PreTrainedModel | PeftModel:
    lm.requires_grad_(not config.lora.enabled)
    if not config.lora.enabled:
        return lm
    if config.model.continues:
        assert config.model.adapter is not None
        read_adapter_config(config.model.adapter)
        model = PeftModel.from_pretrained(lm, config.model.adapter, is_trainable=True)
        _check_continued(model, config.model.adapter)
        if frozen_copy:
            add_reference_adapter(model, config.model.adapter)
        return model
    torch.manual_seed(config.run.seed)
    lora = config.lora
    try:
        return get_peft_model(
            lm,
            PeftLoraConfig(
                r=lora.r,
                lora_alpha=lora.scale_numerator,  # type: ignore[arg-type]  # PEFT types it int, and divides by r
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ValueError(
            f"lora.target_modules: {_first_line(error)}; name linear layers such as q_proj, or all-linear"
        ) from None
