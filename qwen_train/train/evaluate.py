"""Held-out data: loss, accuracy, whether turns end by themselves, and greedy answers beside the expected ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwen_train.config import SFTConfig
from qwen_train.data.chat import Template
from qwen_train.data.stream import Collate, eval_batches
from qwen_train.data.tokenize import TokenDataset
from qwen_train.model.load import PackedLM
from qwen_train.model.memory import microbatch_tokens
from qwen_train.train.distributed import Run

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
