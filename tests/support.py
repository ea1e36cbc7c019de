"""What several tests share: the folder of real data beside the checkout, and tokenizers with and without it.

`mini_tokenizer` is a cut of Qwen2.5's vocabulary (tests/golden/tokenizer.json, written by tests/golden/make.py): all
bytes, and the merges that the golden texts need, under their real ids. It encodes the golden texts exactly as the real
tokenizer does and any other text in smaller pieces, so the mask is held where the real vocabulary is absent.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen_train.data.chat import ChatOptions, Template
from qwen_train.data.formats import Conversation, Preference, RowError

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = Path(__file__).parent / "golden"
needs_shared = pytest.mark.skipif(
    not (SHARED / "qwen2.5-tokenizer").is_dir(), reason=f"needs the real tokenizer and data in {SHARED}"
)

QWEN3_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")
"""What Qwen3 adds to Qwen2.5's control tokens, with ids from 151665 on."""

Family = Literal["qwen2.5", "qwen3"]


def encode_one(template: Template, row: Conversation | Preference, options: ChatOptions) -> Any:
    """What the template makes of one row; raises the RowError that it deserves."""
    (result,) = template.encode("sft" if isinstance(row, Conversation) else "dpo", [row], options)
    if isinstance(result, RowError):
        raise result
    return result


def template_text(family: Family) -> str:
    return (GOLDEN / f"{family}.jinja").read_text()


@cache
def mini_tokenizer(family: Family = "qwen2.5") -> Any:
    state = json.loads((GOLDEN / "tokenizer.json").read_text())
    if family == "qwen3":
        for index, token in enumerate(QWEN3_TOKENS, start=151665):
            state["model"]["vocab"][token] = index
            state["added_tokens"].append({**state["added_tokens"][-1], "id": index, "content": token})
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template_text(family),
    )


@cache
def real_tokenizer(family: Family = "qwen2.5") -> Any:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5-tokenizer")
    if family == "qwen3":
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN3_TOKENS])
        tokenizer.chat_template = template_text("qwen3")
    return tokenizer
