"""Held-out data: loss, accuracy, whether turns end by themselves, and greedy answers beside the expected ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwen_train.config import DPOConfig, SFTConfig
from qwen_train.data.chat import Template
from qwen_train.data.stream import Collate, collate_preferences, eval_batches, packed_lengths
from qwen_train.data.tokenize import TokenDataset
from qwen_train.loss.preference import LossConfig, Pairs, metric_sums, metrics_from_sums, preference_loss
from qwen_train.model.load import PackedLM
from qwen_train.model.memory import microbatch_tokens
from qwen_train.train.distributed import Run
from qwen_train.train.reference import Reference, RefLogps, score_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_train.data.packing import IntArray


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, ready to be scored, and the prompts that are answered."""

    lengths: "IntArray"
    """Packed tokens of each row."""
    collate: Collate
    tokens_per_microbatch: int
    prompts: Sequence[list[int]]
    """Token ids up to the last answer, of the first rows."""
    answers: Sequence[list[int]]
    """The expected last answers, end token included."""
    max_new_tokens: int


def hold_out(data: TokenDataset, collate: Collate, template: Template, config: SFTConfig) -> HeldOut:
    """Held-out conversations of `data`; the last answers of the first `run.eval_samples` rows are to be generated."""
    prompts, answers = [], []
    for ids in data.dataset[: config.run.eval_samples]["input_ids"]:
        start, end = template.assistant_spans(np.asarray(ids))[-1]
        prompts.append(ids[:start])
        answers.append(ids[start:end])
    lengths = data.column("length")
    tokens = max(microbatch_tokens(config), int(lengths.max()))
    return HeldOut(lengths, collate, tokens, prompts, answers, config.run.eval_sample_tokens)


@torch.no_grad()
def evaluate_sft(run: Run, model: PackedLM, held_out: HeldOut) -> dict[str, float]:
    """Exact means over all held-out tokens: `eval/loss` (nats per token, weighted), `eval/mean_token_accuracy` and
    `eval/turns_ended` (share of turns at whose end the end token is the likeliest)."""
    sums = torch.zeros(6, dtype=torch.float64, device=run.device)
    model.eval()
    for batch in eval_batches(
        lengths=held_out.lengths,
        collate=held_out.collate,
        tokens_per_microbatch=held_out.tokens_per_microbatch,
        rank=run.rank,
        world_size=run.world_size,
    ):
        batch = batch.to(run.device, non_blocking=True)
        scores = model(batch)
        ends = batch.targets == model.end_token
        values = (
            -(scores.logps.double() * batch.weights).sum(),
            batch.weights.double().sum(),
            scores.is_argmax.sum(),
            torch.tensor(len(batch.targets)),
            (scores.is_argmax & ends).sum(),
            ends.sum(),
        )
        sums += torch.stack([value.to(sums) for value in values])
    model.train()
    nll, weight, correct, tokens, ended, turns = run.sum(sums)
    return {
        "eval/loss": nll / weight,
        "eval/mean_token_accuracy": correct / tokens,
        "eval/turns_ended": ended / max(turns, 1),
    }


def sample_answers(
    run: Run, model: PackedLM, held_out: HeldOut, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Greedy answers to the held-out prompts, each rank taking its share.

    Returns `eval/exact_match` (share equal to the expected answer, end token included) and `eval/samples_ended` (share
    that ended within the limit), and for every prompt the texts prompt, expected and answer.
    """

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    mine = range(run.rank, len(held_out.prompts), run.world_size)
    drawn = model.sample([held_out.prompts[index] for index in mine], held_out.max_new_tokens)
    parts = run.gather(dict(zip(mine, drawn, strict=True)))
    by_index = {index: answer for part in parts for index, answer in part.items()}
    answers = [by_index[index] for index in range(len(held_out.prompts))]
    exact = [answer == expected for answer, expected in zip(answers, held_out.answers, strict=True)]
    ended = [bool(answer) and answer[-1] == model.end_token for answer in answers]
    texts = [
        {"prompt": text(prompt), "expected": text(expected), "answer": text(answer)}
        for prompt, expected, answer in zip(held_out.prompts, held_out.answers, answers, strict=True)
    ]
    return {"eval/exact_match": sum(exact) / len(exact), "eval/samples_ended": sum(ended) / len(ended)}, texts


# --- Pairs


def hold_out_pairs(data: TokenDataset, config: DPOConfig) -> HeldOut:
    """Held-out pairs of `data`; the first `run.eval_samples` prompts are answered, the chosen answer is expected."""
    share_prompt = config.reference.share_prompt
    first = data.dataset[: config.run.eval_samples]
    lengths = packed_lengths(data.dataset, share_prompt)
    return HeldOut(
        lengths=lengths,
        collate=collate_preferences(data.dataset, share_prompt),
        tokens_per_microbatch=max(microbatch_tokens(config), int(lengths.max())),
        prompts=first["prompt_ids"],
        answers=first["chosen_ids"],
        max_new_tokens=config.run.eval_sample_tokens,
    )


@torch.no_grad()
def pair_sums(pairs: Pairs, losses: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """What `preference_metrics` needs of some pairs, float64 [18]. Add over micro-batches and ranks.

    Loss, pairs whose chosen answer is the likelier one, change of the chosen and of the rejected log-probability since
    the start (nan without a reference), then `metric_sums`.
    """
    ours = (
        losses,
        pairs.chosen_logps > pairs.rejected_logps,
        losses * math.nan if pairs.ref_chosen_logps is None else pairs.chosen_logratios,
        losses * math.nan if pairs.ref_rejected_logps is None else pairs.rejected_logratios,
    )
    return torch.cat([torch.stack([column.double().sum() for column in ours]), metric_sums(pairs, config)])


def preference_metrics(prefix: str, sums: Sequence[float]) -> dict[str, float]:
    """Means over the pairs that `pair_sums` summed, under their full names."""
    loss, likelier, chosen_change, rejected_change, *rest = sums
    num_pairs = rest[0]
    metrics = {
        "loss": loss / num_pairs,
        **metrics_from_sums(torch.tensor(rest, dtype=torch.float64)),
        "logps/accuracies": likelier / num_pairs,
        "logps/chosen_change": chosen_change / num_pairs,
        "logps/rejected_change": rejected_change / num_pairs,
    }
    return {f"{prefix}/{name}": value for name, value in metrics.items() if not math.isnan(value) or name == "loss"}


@torch.no_grad()
def evaluate_dpo(
    run: Run, model: PackedLM, held_out: HeldOut, ref_logps: RefLogps, config: LossConfig
) -> dict[str, float]:
    """Exact means over all held-out pairs, by the names of training: `eval/loss`, `eval/rewards/accuracies` ..."""
    sums = torch.zeros(18, dtype=torch.float64, device=run.device)
    model.eval()
    for batch in eval_batches(
        lengths=held_out.lengths,
        collate=held_out.collate,
        tokens_per_microbatch=held_out.tokens_per_microbatch,
        rank=run.rank,
        world_size=run.world_size,
    ):
        batch = batch.to(run.device, non_blocking=True)
        reference = ref_logps(batch)
        pairs = score_pairs(model(batch).logps, reference, batch)
        sums += pair_sums(pairs, preference_loss(pairs, config), config)
    model.train()
    return preference_metrics("eval", run.sum(sums))


def sample_both(
    run: Run, model: PackedLM, reference: Reference, held_out: HeldOut, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """`sample_answers` of the policy, beside those of the reference, which are drawn once, since they stay the same."""
    metrics, texts = sample_answers(run, model, held_out, tokenizer)
    if reference.source is None:
        return metrics, texts
    if reference.answers is None:
        with reference.active() as frozen:
            reference.answers = [row["answer"] for row in sample_answers(run, frozen, held_out, tokenizer)[1]]
    rows = zip(texts, reference.answers, strict=True)
    return metrics, [
        {
            "prompt": text["prompt"],
            "chosen": text["expected"],
            "policy": text["answer"],
            "reference": answer,
        }
        for text, answer in rows
    ]
