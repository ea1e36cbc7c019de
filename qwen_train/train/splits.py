"""The rows that a training reads as token arrays, the same on every rank."""

from typing import TYPE_CHECKING

from qwen_train.config import SFTConfig
from qwen_train.data.chat import ChatOptions
from qwen_train.data.sources import data_splits
from qwen_train.data.tokenize import TokenDataset, tokenize
from qwen_train.train.distributed import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_split(run: Run, config: SFTConfig, name: str, tokenizer: "PreTrainedTokenizerBase") -> TokenDataset:
    """One of `data_splits(config)`: tokenised by the first rank of each machine, read from the cache by the others.

    Raises ValueError with the rows in error, and where machines have other rows than rank 0's.
    """
    split, data = data_splits(config)[name], config.data
    tokenized = run.main_first(
        lambda: tokenize(
            split.kind,
            split.paths,
            tokenizer,
            ChatOptions.from_config(data),
            format=split.format,
            workers=data.workers,
            cache_dir=data.cache_dir,
            name=name,
        )
    )
    run.require_alike(name, tokenized.fingerprint)
    run.note(f"{name}: {tokenized.report.summary()}")
    if warning := tokenized.report.warning:
        run.note(f"{name}: {warning}")
    return tokenized
