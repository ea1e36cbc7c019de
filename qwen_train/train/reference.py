"""The reference of the preference losses: log-probabilities of the frozen start, online or looked up, and its proofs.

Online, the reference scores each micro-batch as the policy sees it: the model with its adapter off (`adapter_off`),
with a frozen copy of the adapter that training continues (`start_adapter`), or another model (`model`).
Precomputed, every pair is scored once; the sums lie in data.cache_dir under a fingerprint of all that decides them.

Letters: S supervised tokens, N sequences of a batch (two a pair: 2i is chosen, 2i + 1 rejected), R rows of a data set.
"""

import dataclasses
import gc
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qwen_train.config import DPOConfig, reference_source
from qwen_train.data.digest import file_sha256, json_sha256
from qwen_train.data.packing import Batch, IntArray, pack_pairs
from qwen_train.data.scratch import clean_scratch, scratch_folder
from qwen_train.data.stream import Collate, MicroBatches, plan_microbatches
from qwen_train.data.tokenize import TokenDataset
from qwen_train.loss.preference import Pairs
from qwen_train.model.adapters import adapter_sha256, tensor_digest
from qwen_train.model.frozen import nf4_tensors
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.model.memory import microbatch_tokens
from qwen_train.model.packed import PackedLM, evaluating
from qwen_train.train.distributed import Run
from qwen_train.train.files import install_folder, write_file, write_tensors
from qwen_train.train.folder import RunFolder
from qwen_train.train.progress import Progress, accept

logger = logging.getLogger(__name__)

RefLogps = Callable[[Batch], Tensor | None]
"""Batch -> summed log-probability of each sequence under the reference, float64 [N]; None: the loss has none."""

Pair = tuple[IntArray, IntArray, IntArray]
"""Token ids of a prompt, of its chosen and of its rejected answer."""

TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 1e-3)}
"""Nats a token by which the same model may differ from itself: mean of |difference|, |mean of difference|."""
PROBE_ROWS = 4


def score_pairs(logps: Tensor, ref_logps: Tensor | None, batch: Batch) -> Pairs:
    """Log-probabilities [S] of the policy and sums [N] of the reference as pairs."""
    lengths = batch.sequence_sums(torch.ones_like(logps))
    return Pairs.from_sequences(batch.sequence_sums(logps), ref_logps, lengths)


class Reference:
    """The frozen model that the policy is compared with, in evaluation mode and without gradient."""

    def __init__(
        self, config: DPOConfig, policy: PackedLM, tokenizer: PreTrainedTokenizerBase, run: Run, base: Path | None
    ) -> None:
        """For source `model` this loads the second model; `base` is that of `load_model`."""
        self.config = config
        self.source = reference_source(config)
        self.device = run.device
        self.model: PackedLM = policy
        if self.source == "model":
            self.model = _second_model(config, tokenizer, run, base)
        self.weights_digest = ""
        if self.source is not None and config.reference.precompute:
            digest = self._digest(run)
            self.weights_digest = run.from_main(lambda: digest)

    @contextmanager
    def active(self) -> Iterator[PackedLM]:
        """The model that scores and answers as the reference."""
        switch = {"adapter_off": self.model.adapter_off, "start_adapter": self.model.reference_adapter}
        with evaluating(self.model), switch.get(self.source or "", nullcontext)():
            yield self.model

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor | None:
        """Summed log-probabilities float64 [N], in the layout and the micro-batch that the policy sees."""
        if self.source is None:
            return None
        with self.active() as model:
            return batch.sequence_sums(model(batch).logps)

    def of_data(self, run: Run, data: TokenDataset, collate: Collate, lengths: IntArray) -> RefLogps:
        """The reference of one data set: `logps` itself, or with `reference.precompute` a table that knows every row.

        The table comes from the cache if there is one of this fingerprint that is whole and agrees, on a few rows, with
        what the reference says now; otherwise it is scored, each rank its share, and written.
        """
        if self.source is None or not self.config.reference.precompute:
            return self.logps
        parts = {
            "source": self.source,
            "weights": self.weights_digest,
            "adapter": adapter_sha256(self.config.model.adapter or "") if self.source == "start_adapter" else None,
            "data": data.report.content,
            "dtype": self.config.model.dtype,
            "quantization": self.config.model.quantization,
            "version": importlib.metadata.version("transformers"),
        }
        cache = Path(self.config.data.cache_dir) / "reference" / json_sha256(parts)[:16]
        table, problem = run.from_main(lambda: _read_table(cache, len(data)))
        if table is not None:
            rows = probe_rows(len(data))
            problem = self._problem(run, [collate([row]) for row in rows], table[rows])
        if table is None or problem is not None:
            if problem is not None:
                run.note(f"reference: {cache} is not used, {problem}; all pairs are scored again")
            table = self._score_all(run, collate, lengths)
            run.from_main(lambda: _write_table(cache, table, parts))
            run.note(f"reference: {len(data):,} pairs scored, kept in {cache}")
        else:
            run.note(f"reference: {len(data):,} pairs from {cache}")
        known = table.to(self.device)

        def look_up(batch: Batch) -> Tensor:
            return known[torch.tensor(batch.rows, dtype=torch.int64, device=known.device)].flatten()

        return look_up

    def release(self) -> None:
        """Let go of a second model whose log-probs are all known; nothing may be asked of the reference any more."""
        del self.model
        gc.collect()  # layers and their forwards refer to each other: until some collection the weights would stay

    def prove(self, run: Run, data: TokenDataset, folder: RunFolder, progress: Progress) -> None:
        """Note log-probs of a few pairs in `progress` when a run begins; compare with them when it goes on.

        The pairs are kept as token ids: other rows of the same reference are not another reference. Raises ValueError
        when it is no longer what it was, its files replaced or read otherwise (see `accept`).
        """
        problem: str | None = "its checkpoint holds no log-probs that could prove it to be the same"
        if stored := progress.reference:
            pairs = [_pair(np.array(part.split(), dtype=np.int64) for part in pair) for pair in stored["pairs"]]
            problem = self._problem(run, self._batches(pairs), torch.tensor(stored["logps"], dtype=torch.float64))
            if problem is None:
                return
            problem = f"it is not the one this run began with, its log-probs differ {problem}"
        if folder.checkpoint is not None:
            accept(run, folder, "the reference is another", f"reference: {problem}", "with what it is now")
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        pairs = [_pair(np.asarray(data.dataset[row][name]) for name in names) for row in probe_rows(len(data))]
        texts = [[" ".join(map(str, part)) for part in pair] for pair in pairs]  # of JSON's lists each id is a line
        progress.reference = {"pairs": texts, "logps": self._score_each(self._batches(pairs)).tolist()}

    def _batches(self, pairs: Sequence[Pair]) -> list[Batch]:
        """Each pair in a micro-batch of its own."""
        return [pack_pairs([pair], [0], self.config.reference.share_prompt) for pair in pairs]

    def _problem(self, run: Run, batches: Sequence[Batch], expected: Tensor) -> str | None:
        """How the log-probabilities of pairs differ from [len(batches), 2], if by more than the tolerance."""
        found = self._score_each(batches)
        tokens = sum(len(batch.targets) for batch in batches)
        difference = found.double() - expected.double().cpu()
        absolute, signed = float(difference.abs().sum()) / tokens, float(difference.sum()) / tokens
        return run.from_main(lambda: _beyond_tolerance(absolute, signed, self.config.model.dtype))

    def _score_each(self, batches: Sequence[Batch]) -> Tensor:
        """Log-probabilities [len(batches), 2] of batches of one pair."""
        return torch.cat([self._score(batch) for batch in batches]).cpu()

    def _score_all(self, run: Run, collate: Collate, lengths: IntArray) -> Tensor:
        """Log-probabilities [R, 2] of every row; the ranks' shares are joined by row."""
        budget = max(microbatch_tokens(self.config), int(lengths.max()))
        microbatches = plan_microbatches(lengths, budget, run.world_size)

        def score(share: list[IntArray]) -> list[list[list[float]]]:
            return [self._score(collate(members.tolist())).tolist() for members in share]

        table = torch.full((len(lengths), 2), torch.nan, dtype=torch.float64)
        for members, scored in zip(microbatches, run.spread(microbatches, score), strict=True):
            table[members] = torch.tensor(scored, dtype=torch.float64).view(-1, 2)
        return table

    def _score(self, batch: Batch) -> Tensor:
        """Log-probabilities [R, 2] of a batch's pairs."""
        logps = self.logps(batch.to(self.device))
        assert logps is not None
        return logps.view(-1, 2)

    def _digest(self, run: Run) -> str:
        """Hash of every frozen weight of the reference, of which a sharded model has one whole at a time."""
        named = sorted(_frozen_tensors(self.model.lm).items())
        return json_sha256([tensor_digest({name: run.gather_shards(tensor)}) for name, tensor in named])[:16]


def _pair(parts: Iterable[IntArray]) -> Pair:
    prompt, chosen, rejected = parts
    return prompt, chosen, rejected


def _frozen_tensors(lm: nn.Module) -> dict[str, Tensor]:
    """Frozen weights and buffers, by names and in forms that the shape of the trained adapter does not change.

    A group of LoRA layers (model/fuse.py) keeps the weights of its members a second time as `frozen_*`, beside columns
    for the adapter's B, which each forward writes; in fp8 these are the only copy, and have no such columns.
    """
    named: dict[str, Tensor] = {}
    for name, value in lm.named_parameters():
        if not value.requires_grad:
            parts = nf4_tensors(value) if hasattr(value, "quant_state") else [value]  # 4 bits mean nothing unscaled
            named |= {f"{name.replace('.base_layer', '')}.{index}": part for index, part in enumerate(parts)}
    for place, module in lm.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if not name.startswith("frozen_") or getattr(module, "kind", None) == "fp8":
                named[f"{place}.{name}"] = value
    return named


def check_reference(config: DPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse (ValueError), before any model loads, a source that cannot be or a reference of another vocabulary."""
    if reference_source(config) == "model" and config.reference.path is not None:
        other = _reference_tokenizer(config)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"reference.path: {config.reference.path} has another vocabulary than {config.model.path} "
                f"({len(other)} and {len(tokenizer)} tokens), so its log-probs mean other texts; give a model of the "
                "same tokenizer"
            )


def _reference_tokenizer(config: DPOConfig) -> PreTrainedTokenizerBase:
    assert config.reference.path is not None
    model = dataclasses.replace(config.model, path=config.reference.path, revision=None, adapter=None)
    try:
        return load_tokenizer(model)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path:", "reference.path:")) from None


def _second_model(config: DPOConfig, tokenizer: PreTrainedTokenizerBase, run: Run, base: Path | None) -> PackedLM:
    """`reference.path`, or without one a second copy of what training starts from; frozen."""
    model = config.model
    if config.reference.path is not None:
        model = dataclasses.replace(
            model, path=config.reference.path, revision=None, adapter=None, from_scratch=False, quantization="none"
        )
    lora = dataclasses.replace(config.lora, enabled=False)
    config = dataclasses.replace(config, model=model, lora=lora)
    reference = load_model(config, tokenizer, run.device, base, run.is_main, sharded=run.sharded, frozen=True)
    return run.prepare(reference).eval()


# The cache -----------------------------------------------------------------------------------------------------------


def _read_table(cache: Path, num_rows: int) -> tuple[Tensor | None, str | None]:
    """The table [R, 2] of a cache folder; None with a reason if it is not whole, None alone if there is none."""
    if not cache.exists():
        return None, None
    try:
        expected = json.loads((cache / "manifest.json").read_text())["sha256"]
        found = file_sha256(cache / "logps.safetensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"it is damaged ({error})"
    if found != expected:
        return None, "it is damaged (logps.safetensors is not as it was written)"
    table = load_file(cache / "logps.safetensors")["logps"]
    if table.shape != (num_rows, 2):
        return None, f"it holds {len(table)} rows and the data {num_rows}"
    return table, None


def _write_table(cache: Path, table: Tensor, parts: dict[str, str | None]) -> None:
    for left in clean_scratch(cache.parent):
        logger.warning("%s: deleted, left by a process that died while writing it", left)
    try:
        with scratch_folder(cache) as temporary:
            entry = write_tensors(temporary / "logps.safetensors", {"logps": table})
            write_file(temporary / "manifest.json", [json.dumps({**entry, "parts": parts}, indent=1).encode()])
            install_folder(temporary, cache)
    except OSError as error:
        if _read_table(cache, len(table))[0] is not None:
            return  # another run of the same pairs has put its own there in this very moment
        raise ValueError(
            f"data.cache_dir: the reference's log-probs cannot be written to {cache} ({error.strerror}); free space, "
            "set data.cache_dir, or leave out reference.precompute"
        ) from None


# Proof that policy = reference at step 0 -----------------------------------------------------------------------------


def _beyond_tolerance(absolute: float, signed: float, dtype: str) -> str | None:
    """What is wrong with a mean absolute and a mean signed difference, nats a token; None if nothing."""
    most, most_signed = TOLERANCE[dtype]
    if absolute <= most and abs(signed) <= most_signed:  # not so for nan
        return None
    return f"by {absolute:.1e} nats a token (mean {signed:+.1e}; at most {most:.0e} and {most_signed:.0e} in {dtype})"


def probe_rows(num_rows: int) -> list[int]:
    """A few rows, evenly spread."""
    return sorted({index * (num_rows - 1) // max(1, PROBE_ROWS - 1) for index in range(PROBE_ROWS)})


def audit_start(
    run: Run, policy: PackedLM, reference: Reference, ref_logps: RefLogps, microbatches: MicroBatches
) -> None:
    """Prove on this rank's first micro-batches that the policy, before its first update, equals the reference.

    Otherwise every reward is off from the start. Raises ValueError with the cause it found, on all ranks alike.
    """
    batches = [batch.to(run.device) for batch in microbatches.batches[:2]]
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)
    for batch in batches:
        expected = ref_logps(batch)
        assert expected is not None
        difference = _policy_logps(policy, batch) - expected
        sums += torch.stack([difference.abs().sum(), difference.sum(), sums.new_tensor(len(batch.targets))])
    absolute, signed, tokens = run.sum(sums)
    absolute, signed = absolute / max(tokens, 1), signed / max(tokens, 1)
    problem = _beyond_tolerance(absolute, signed, reference.config.model.dtype)
    if problem is not None:
        raise ValueError(
            f"reference.source: before the first update the policy differs from its reference ({reference.source}) "
            f"{problem}: {_cause(run, policy, reference, ref_logps, batches[0])}"
        )
    run.note(f"step 0: policy and reference ({reference.source}) differ by {absolute:.1e} nats a token")


@torch.no_grad()
def _policy_logps(policy: PackedLM, batch: Batch) -> Tensor:
    with evaluating(policy):
        return batch.sequence_sums(policy(batch).logps)


def _cause(run: Run, policy: PackedLM, reference: Reference, ref_logps: RefLogps, batch: Batch) -> str:
    """Why policy and reference differ, as the end of the message, with the remedy.

    Found by all ranks together, each with a batch of its own: every forward gathers what is sharded.
    """

    most = TOLERANCE[reference.config.model.dtype][0]

    def differ(left: Tensor | None, right: Tensor | None) -> bool:
        assert left is not None and right is not None
        alike = float((left - right).abs().sum()) <= most * max(len(batch.targets), 1)  # not so for nan
        return run.maximum(float(not alike)) > 0

    once = _policy_logps(policy, batch)
    if differ(once, _policy_logps(policy, batch)):
        return "two passes of the policy differ, too: dropout is active in evaluation mode; look for a layer that draws"
    if ref_logps != reference.logps and differ(ref_logps(batch), reference.logps(batch)):
        return "the stored log-probs are not those of this reference (a stale cache); empty data.cache_dir/reference"
    adapter = [p for name, p in policy.lm.named_parameters() if "lora_B" in name and p.requires_grad]
    trained = any(bool(run.gather_shards(p).any()) for p in adapter)
    if reference.source == "adapter_off" and trained:
        return (
            "the adapter is a trained one, and switching it off gives the model before it; use reference.source auto "
            "(a frozen copy of it), or model.adapter_start merge"
        )
    if reference.source == "model":
        path = reference.config.reference.path
        if path is not None and _reference_tokenizer(reference.config).chat_template != _template(reference.config):
            return f"{path} is another model, of another chat template; give the model that training starts from"
        return f"{path} holds other weights than what training starts from; give those, or use reference.source auto"
    return "no cause was found: the forward of the reference differs from the policy's"


def _template(config: DPOConfig) -> str:
    return str(load_tokenizer(config.model).chat_template)
