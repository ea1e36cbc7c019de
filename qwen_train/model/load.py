"""Tokenizer, config and model: `load_model` makes the model of a run, transformers' own with an adapter or without.

Around the weights (weights.py) it adds LoRA or continues an adapter, and sets up packed attention, single operations,
compilation and activation checkpointing.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from qwen_train.config import HEADS, DPOConfig, ModelConfig, SFTConfig, reference_source
from qwen_train.data.sources import is_hub_id
from qwen_train.model.adapters import REFERENCE_ADAPTER, check_template, load_adapter
from qwen_train.model.fuse import fuse_lora, fuse_norms
from qwen_train.model.kernel_check import check_kernels, trusted_attention
from qwen_train.model.packed import PackedLM
from qwen_train.model.weights import base_weights, compute_rotary, first_line

FAMILIES = {"qwen2": "<|im_end|>", "qwen3": "<|im_end|>"}
"""transformers' model_type of each family that is trained, and the token that ends a turn of it."""


# Tokenizer and config -------------------------------------------------------------------------------------------------


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
    if str(model_config.hidden_act) not in ACT2FN:
        raise ValueError(
            f"model.path: the config.json of {config.path} asks for hidden_act {model_config.hidden_act!r}, which "
            "transformers does not know; copy the model's file again (Qwen's is silu)"
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


def missing_folder(path: str) -> str | None:
    """What to say of a path that is not there, where it is a folder's rather than a hub id."""
    if not Path(path).exists() and (not is_hub_id(path) or Path(path).parent.is_dir()):
        return f"the folder {path} does not exist; give a model's folder or hub id"
    return None


def _unreadable(what: str, path: str, error: Exception) -> str:
    if missing := missing_folder(path):
        return f"model.path: {missing}"
    if not Path(path).exists() and "connect" in str(error):
        return (
            f"model.path: {path} is not a folder here, the hub could not be reached for its {what}, and its cache has "
            "none; give a local folder, or with a cached model set HF_HUB_OFFLINE=1"
        )
    return f"model.path: no {what} in {path}: {first_line(error).rstrip('.')}; give a model's hub id or folder"


# The model ------------------------------------------------------------------------------------------------------------


def load_model(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    base: Path | None,
    is_main: bool,
    *,
    sharded: bool = False,
    frozen: bool = False,
) -> PackedLM:
    """The model of a run on `device`: weights, adapter, attention, compilation, checkpointing.

    `base` is the run's own folder for the weights of a `from_scratch` run: read if it is there, else, when an adapter
    is trained, written by the main process; None for random weights that nobody keeps. `sharded`: for FSDP2 the model
    stays on the meta device, in the types of its shards, and the main process reads the weights beside it
    (`PackedLM.source`). `frozen`: nothing of it is trained (a second model as the reference). Raises ValueError for
    what the user can mend.
    """
    model_config = load_model_config(config.model)
    end, pad = special_tokens(tokenizer, model_config.model_type)
    if max(end, pad) >= model_config.vocab_size:
        raise ValueError(
            f"model.path: the control tokens have ids {end} and {pad} in the tokenizer of {config.model.path}, and its "
            f"model has {model_config.vocab_size} tokens (vocab_size); give both of one model"
        )
    dtype = getattr(torch, config.model.dtype)
    attention = trusted_attention(config.model.attention, model_config, device, dtype, config.data.max_length)
    source = None
    if is_main or not sharded:
        lm = base_weights(config, model_config, tokenizer, device, base, is_main, on_cpu=sharded)
        adapted = _with_adapter(lm, config)
    if sharded:
        if is_main:
            source = {f"lm.{name}": tensor for name, tensor in adapted.state_dict().items()}
        adapted = _empty(config, model_config, device, frozen)
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


def _empty(config: SFTConfig, model_config: Any, device: torch.device, frozen: bool) -> PreTrainedModel | PeftModel:
    """The same model on the meta device, trained weights in fp32; its rotary table is real."""
    dtype = getattr(torch, config.model.dtype) if config.lora.enabled or frozen else torch.float32
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation="sdpa")
        adapted = _with_adapter(lm, config)
    compute_rotary(lm, device)
    return adapted


def _with_adapter(lm: PreTrainedModel, config: SFTConfig) -> PreTrainedModel | PeftModel:
    """The adapter to train, fresh or continued; of a continued one also the frozen copy that a reference asks for."""
    lm.requires_grad_(not config.lora.enabled)
    if not config.lora.enabled:
        return lm
    if config.model.continues:
        assert config.model.adapter is not None
        model = _continued(lm, config.model.adapter)
        if reference_source(config) == "start_adapter":
            load_adapter(model, config.model.adapter, REFERENCE_ADAPTER)  # frozen, for `PackedLM.reference_adapter`
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
            f"lora.target_modules: {first_line(error)}; name linear layers such as q_proj, or all-linear"
        ) from None


def _continued(lm: PreTrainedModel, folder: str) -> PeftModel:
    """The base with the adapter on it, to be trained. Raises ValueError for parts that training would miss."""
    model = load_adapter(lm, folder, is_trainable=True)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    beyond = [name for name in adapted if name.endswith(HEADS)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    beyond += [name for name in trained if ".lora_" not in name]
    if beyond:
        raise ValueError(
            f"model.adapter_start: {folder} also holds {beyond[0].removeprefix('base_model.model.')}, which training "
            "here does not reach (heads, embeddings, modules_to_save, biases); use adapter_start merge"
        )
    return model
