"""Packed attention: one function that transformers calls in every layer, over sequences laid end to end, unpadded.

Segment i attends with queries `cu_seqlens_q[i]:cu_seqlens_q[i + 1]` over keys `cu_seqlens_k[i]:cu_seqlens_k[i + 1]`,
causally and aligned bottom-right: its last query sees all of its keys. Keys and values may first be gathered by
`kv_index`, so that one prompt serves two answers. Four backends do the same sum: `flash4` and `flash` (the flash-attn-4
and flash-attn packages; `model.attention: flash` means the first of them that serves this GPU), `varlen` (torch's own
kernel, CUDA) and `sdpa` (anywhere and in any dtype; the reference of the others).

`attention_kwargs(batch, backend)` prepares once per forward what every layer needs; the transformers base model passes
these keyword arguments down to `packed_attention` untouched. Only `AttentionInterface` knows our name: for an attention
without a mask function transformers builds no mask, and does not look for packed sequences in `position_ids` either,
which would stop the host on a GPU in every forward.

Letters: T packed tokens, K gathered keys, N segments, H query heads, G key heads, E head dimension.
"""

import importlib.metadata
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from qwen_train.data.packing import Batch

try:
    from flash_attn import flash_attn_varlen_func

    FLASH_PROBLEM = ""
except ImportError as error:
    flash_attn_varlen_func = None
    FLASH_PROBLEM = str(error)

FLASH4_GPUS = (9, 10)
"""Major compute capabilities that flash-attn-4 is used on: H100 and H200, B200 and B300."""

PACKAGES = {"flash4": "flash-attn-4", "flash": "flash-attn", "varlen": "torch's varlen kernel", "sdpa": "torch's SDPA"}
"""What each backend runs on, for people."""

ATTENTION = "qwen_train"
"""What `attn_implementation` must say for a model whose forward gets `attention_kwargs`."""

# torch 2.13 wants a flag for fewer key than query heads; 2.11 has no such flag and its kernel takes them as they are.
VARLEN_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

GROUP_LENGTH = 128
"""sdpa: segments of up to this many keys are padded to one length; longer ones are grouped by powers of two."""


class PaddedGroup(NamedTuple):
    """The n segments of similar length that one call of SDPA takes, padded to q queries and k keys."""

    query_index: Tensor
    """Packed token of each padded query; int64[n * q]."""
    key_index: Tensor
    """Packed token of each padded key, `kv_index` applied; int64[n * k]."""
    mask: Tensor
    """Which key each query may see; bool[n, 1, q, k]."""


def resolve_attention(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    dropout: bool = False,
    flash4: bool = True,
) -> str:
    """The backend that `model.attention` (`name`) means here; ValueError when this device or dtype lacks it.

    flash-attn-4, which knows no dropout, comes before flash-attn; without `flash4` it does not count.
    """
    device = torch.device(device)
    problem = _kernel_problem(device, dtype)
    if name == "auto" and problem:
        return "sdpa"
    if name != "sdpa" and problem:
        raise ValueError(f"model.attention: {name} {problem}; use sdpa or auto")
    if name in ("auto", "flash"):
        if flash4 and not dropout and torch.cuda.get_device_capability(device)[0] in FLASH4_GPUS and has_flash4():
            return "flash4"
        if flash_attn_varlen_func is not None:
            return "flash"
    if name == "flash":
        raise ValueError(
            f"model.attention: flash needs the flash-attn package ({FLASH_PROBLEM}), or flash-attn-4 on an H100, H200 "
            "or B200 and a model without attention_dropout; install one with `pip install flash-attn` or `pip install "
            "'flash-attn-4[cu13]'`, or use varlen or auto"
        )
    return "varlen" if name == "auto" else name


def has_flash4() -> bool:
    """Whether flash-attn-4 is installed, by its distribution: flash-attn 2 has a folder of the same name, unusable."""
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _kernel_problem(device: torch.device, dtype: torch.dtype) -> str:
    """Why the fused kernels cannot run here, as the end of a sentence; empty when they can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs a CUDA device, got {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs an Ampere GPU or newer, got {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16 only, got {dtype}"
    return ""


def check_config(config: Any, backend: str) -> None:
    """Refuse (ValueError) what `packed_attention` would get silently wrong for a transformers config.

    Sliding windows, of which it knows nothing, and dropout in kernels that have none.
    """
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding and config.sliding_window is not None:
        raise ValueError(
            "model: sliding-window attention is not supported by packed training, got a layer with a window of "
            f"{config.sliding_window} tokens; set use_sliding_window to false in the model's config.json"
        )
    if config.attention_dropout > 0 and backend in ("flash4", "varlen"):
        raise ValueError(
            f"model: attention_dropout is not supported by {PACKAGES[backend]}, got "
            f"{config.attention_dropout}; set attention_dropout to 0 in the model's config.json, or model.attention to "
            "sdpa, or install flash-attn"
        )


def attention_kwargs(batch: Batch, backend: str) -> dict[str, Any]:
    """Keyword arguments of the transformers base model's forward that make its layers attend within segments.

    Call it with `attn_implementation=ATTENTION`, `input_ids[1, T]`, `position_ids[1, T]` and `use_cache=False`. Every
    token must lie in a segment; segments without queries are legal. `max_q` and `max_k` may be upper bounds. For the
    kernels the host does not wait for the device; `sdpa` reads the lengths on the host.
    """
    if backend == "sdpa":
        groups, restore = _padding_plan(batch)
        return {"packed_backend": backend, "packed_groups": groups, "packed_restore": restore}
    return {
        "packed_backend": backend,
        "packed_cu_q": batch.cu_seqlens_q,
        "packed_cu_k": batch.cu_seqlens_k,
        "packed_max_q": batch.max_q,
        "packed_max_k": batch.max_k,
        "packed_kv_index": batch.kv_index,
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    packed_backend: str | None = None,
    packed_cu_q: Tensor | None = None,
    packed_cu_k: Tensor | None = None,
    packed_max_q: int = 0,
    packed_max_k: int = 0,
    packed_kv_index: Tensor | None = None,
    packed_groups: tuple[PaddedGroup, ...] = (),
    packed_restore: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query[1, H, T, E], key and value[1, G, T, E] -> [1, T, H, E]."""
    if packed_backend is None:
        raise ValueError(
            f"attention: {ATTENTION!r} needs packed sequences, got a forward without attention_kwargs; "
            "switch the model to sdpa for anything else (generation, padded batches)"
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, E]
    if packed_backend == "sdpa":
        assert packed_restore is not None
        return _sdpa(q, k, v, packed_groups, packed_restore, scaling, dropout)[None], None
    # Under autocast rotary embeddings return float32, which the kernels do not take; values come from a linear layer.
    q, k, v = q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous(), v.contiguous()
    if packed_kv_index is not None:
        # Not k[kv_index]: the backward of indexing sorts the index, that of index_select adds in place.
        k, v = k.index_select(0, packed_kv_index), v.index_select(0, packed_kv_index)
    assert packed_cu_q is not None and packed_cu_k is not None
    lengths = (packed_cu_q, packed_cu_k, packed_max_q, packed_max_k)
    if packed_backend == "flash4":
        from qwen_train.model.flash4 import flash4  # costs seconds, and needs its package

        out, _ = flash4(q, k, v, *lengths, scaling)
    elif packed_backend == "flash":
        deterministic = torch.are_deterministic_algorithms_enabled()  # else dQ is summed in the order blocks finish
        out = flash_attn_varlen_func(
            q, k, v, *lengths, dropout_p=dropout, softmax_scale=scaling, causal=True, deterministic=deterministic
        )
    else:
        out = varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(-1, 0), **VARLEN_GQA)
    return out[None], None


def _padding_plan(batch: Batch) -> tuple[tuple[PaddedGroup, ...], Tensor]:
    """Groups of segments to pad together, and for each packed token its row among the padded queries of all groups."""
    device = batch.input_ids.device
    cu_q, cu_k = batch.cu_seqlens_q.cpu().long(), batch.cu_seqlens_k.cpu().long()
    kv_index = None if batch.kv_index is None else batch.kv_index.cpu()
    lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
    assert int(cu_q[-1]) == batch.input_ids.numel(), "every token must lie in a segment"
    # Padding all segments to the longest would cost N * longest^2; within a power of two the waste is at most fourfold.
    classes = lengths_k.clamp(min=GROUP_LENGTH).sub(1).double().log2().floor()
    classes[lengths_q == 0] = -1
    groups, restore, offset = [], torch.empty(int(cu_q[-1]), dtype=torch.int64), 0
    for value in classes.unique().tolist():
        if value < 0:
            continue
        members = (classes == value).nonzero().squeeze(1)
        n_q, n_k = lengths_q[members, None], lengths_k[members, None]  # [n, 1]
        columns_q, columns_k = torch.arange(int(n_q.max())), torch.arange(int(n_k.max()))
        real = columns_q < n_q  # [n, q]
        query_index = cu_q[members, None] + columns_q.where(real, 0)
        key_index = cu_k[members, None] + columns_k.where(columns_k < n_k, 0)
        if kv_index is not None:
            key_index = kv_index[key_index]
        # Query i of a segment sees keys up to i + (keys - queries); a padded query sees the first one, to stay finite.
        last_seen = torch.where(real, columns_q + (n_k - n_q), 0)
        mask = columns_k <= last_seen[:, :, None]
        restore[query_index[real]] = offset + real.flatten().nonzero().squeeze(1)
        offset += real.numel()
        padded = (query_index.flatten(), key_index.flatten(), mask[:, None])
        groups.append(PaddedGroup(*(x.to(device) for x in padded)))
    return tuple(groups), restore.to(device)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, groups: tuple[PaddedGroup, ...], restore: Tensor, scaling: float, dropout: float
) -> Tensor:
    """Attention by PyTorch's SDPA on padded groups of segments: q[T, H, E], k and v[T, G, E] -> [T, H, E]."""
    outputs = []
    for query_index, key_index, mask in groups:
        n, _, n_q, n_k = mask.shape
        padded_q = q.index_select(0, query_index).view(n, n_q, *q.shape[1:]).transpose(1, 2)
        padded_k = k.index_select(0, key_index).view(n, n_k, *k.shape[1:]).transpose(1, 2)
        padded_v = v.index_select(0, key_index).view(n, n_k, *v.shape[1:]).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            padded_q,
            padded_k,
            padded_v,
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(n * n_q, *q.shape[1:]))
    return torch.cat(outputs).index_select(0, restore)


AttentionInterface.register(ATTENTION, packed_attention)
