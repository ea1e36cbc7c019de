"""The rows that a training reads as token arrays, the same on every rank."""

from transformers import PreTrainedTokenizerBase

from qwen_train.config import SFTConfig
from qwen_train.data.chat import ChatOptions
from qwen_train.data.sources import data_splits, resolve_paths, source_places
from qwen_train.data.tokenize import TokenDataset, tokenize
from qwen_train.model.load import load_model_config
from qwen_train.train.distributed import Run


def load_split(run: Run, config: SFTConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> TokenDataset:
    """One of `data_splits(config)`: tokenised by the first rank of each machine, read from the cache by the others.

    Raises ValueError with the rows in error, for tokens that the model has not, and where machines have other rows than
    rank 0's.
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
    vocabulary = load_model_config(config.model).vocab_size
    if len(tokenizer) > vocabulary <= (largest := tokenized.largest_id()):  # an index error, after which a GPU is lost
        raise ValueError(
            f"{name}: the tokenizer of {config.model.path} gives these rows ids up to {largest}, and its model has "
            f"{vocabulary} tokens (vocab_size); give both of one model"
        )
    run.require_alike(name, tokenized.report.content)
    run.note(f"{name}: {tokenized.report.summary()}", *_trained_on(config, name, tokenized))
    if warning := tokenized.report.warning:
        run.note(f"warning: {name}: {warning}")
    return tokenized


def _trained_on(config: SFTConfig, name: str, held_out: TokenDataset) -> list[str]:
    """A warning for each path of held-out rows whose files are data.train's too; single rows are launch/check.py's."""
    if name == "data.train":
        return []
    trained = {place for source in resolve_paths(config.data.train) for place in source_places(source.path)}
    warnings = []
    for path in held_out.paths:
        places = source_places(path)
        if both := sorted(places & trained):
            what = path if len(both) == len(places) else f"{both[0]} of {path}"
            warnings.append(f"warning: {name}: {what} is trained on as well; take it out of one of the two")
    return warnings
