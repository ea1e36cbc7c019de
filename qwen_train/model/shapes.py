"""Shapes of the Qwen family, so that a plan needs neither weights nor a network.

From the config.json of each model on the hub (Qwen/Qwen2.5-7B-Instruct and so on; base and Instruct are alike). Only
sizes that memory and speed depend on; training itself always reads the model's own config.json.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, Qwen2Config, Qwen3Config

from qwen_train.config import ModelConfig
from qwen_train.model.load import load_model_config

# name: hidden size, intermediate size, layers, query heads, key heads, vocabulary, whether head and embedding are one
QWEN25 = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
    "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 152064, False),
    "Qwen2.5-72B": (8192, 29568, 80, 64, 8, 152064, False),
}
QWEN3 = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 151936, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 151936, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 151936, True),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 151936, False),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, 151936, False),
    "Qwen3-32B": (5120, 25600, 64, 64, 8, 151936, False),
}
"""Heads of Qwen3 have 128 features whatever the hidden size."""


def shape_of(model: ModelConfig) -> Any:
    """transformers' config of the model: of its folder or the hub's cache, else of the table, else of the hub.

    Raises ValueError for a model that none of them knows.
    """
    if not _is_here(model) and (known := known_shape(model.path)) is not None:
        return known
    return load_model_config(model)


def known_shape(path: str) -> Any:
    """The family's config of that name; None for other models."""
    name = path.removeprefix("Qwen/").removesuffix("-Instruct")
    sizes = (QWEN25 | QWEN3).get(name)
    if sizes is None:
        return None
    hidden, wide, layers, heads, kv_heads, vocab, tied = sizes
    values: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    }
    return Qwen2Config(**values) if name in QWEN25 else Qwen3Config(**values, head_dim=128)


def _is_here(model: ModelConfig) -> bool:
    if Path(model.path).is_dir():
        return True
    try:
        AutoConfig.from_pretrained(model.path, revision=model.revision, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True
