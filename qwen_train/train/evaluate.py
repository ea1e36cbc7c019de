"""Held-out data: loss, accuracy, whether turns end by themselves, and greedy answers beside the expected ones."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qwen_train.config import DPOConfig, SFTConfig
from qwen_train.data.chat import Template
from qwen_train.data.packing import Batch, IntArray
from qwen_train.data.stream import (
    Collate,
    collate_conversations,
    collate_preferences,
    packed_lengths,
    plan_microbatches,
)
from qwen_train.data.tokenize import TokenDataset
from qwen_train.loss.preference import NUM_SUMS, LossConfig, metric_sums, metrics_from_sums, preference_loss
from qwen_train.model.memory import microbatch_tokens
from qwen_train.model.packed import PackedLM, evaluating
from qwen_train.train.distributed import Run
from qwen_train.train.progress import Progress
from qwen_train.train.reference import Reference, RefLogps, score_pairs
from qwen_train.train.signals import Interrupted


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, ready to be scored, and the prompts that are answered."""

    lengths: IntArray
    """Packed tokens of each row."""
    collate: Collate
    plan: list[IntArray]
    """Rows of each micro-batch of every rank (`plan_microbatches`)."""
    prompts: Sequence[list[int]]
    """Token ids up to the last answer, of the first rows."""
    answers: Sequence[list[int]]
    """The expected last answers, end token included."""
    max_new_tokens: int


def hold_out(data: TokenDataset, tokenizer: PreTrainedTokenizerBase, config: SFTConfig, world_size: int) -> HeldOut:
    """Held-out conversations of `data`; the last answers of the first `run.eval_samples` rows are to be generated."""
    template = Template(tokenizer)
    prompts, answers = [], []
    for ids in data.dataset[: config.run.eval_samples]["input_ids"]:
        start, end = template.assistant_spans(np.asarray(ids))[-1]
        prompts.append(ids[:start])
        answers.append(ids[start:end])
    lengths = data.column("length")
    return HeldOut(
        lengths=lengths,
        collate=collate_conversations(data.dataset),
        plan=_plan(lengths, config, world_size),
        prompts=prompts,
        answers=answers,
        max_new_tokens=config.run.eval_sample_tokens,
    )


def _plan(lengths: IntArray, config: SFTConfig, world_size: int) -> list[IntArray]:
    """Held-out rows as micro-batches of training's budget, or of the longest row if that is longer."""
    return plan_microbatches(lengths, max(microbatch_tokens(config), int(lengths.max())), world_size)


def _in_evaluation(run: Run, model: PackedLM, held_out: HeldOut) -> Iterator[Batch]:
    """This rank's held-out batches on the device, the model in evaluation mode until they end.

    Raises Interrupted, on all ranks alike, when a signal asks the run to leave.
    """
    with evaluating(model):
        for rows in held_out.plan[run.rank :: run.world_size]:
            if run.should_stop():
                raise Interrupted("stopped in an evaluation")
            yield held_out.collate(rows.tolist()).to(run.device, non_blocking=True)


@torch.no_grad()
def evaluate_sft(run: Run, model: PackedLM, held_out: HeldOut) -> dict[str, float]:
    """Exact means over all held-out tokens: `eval/loss` (nats per token, weighted), `eval/mean_token_accuracy` and
    `eval/turns_ended` (share of turns at whose end the end token is the likeliest).

    Raises Interrupted, on all ranks alike, when a signal asks the run to leave.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=run.device)
    for batch in _in_evaluation(run, model, held_out):
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
    nll, weight, correct, tokens, ended, turns = run.sum(sums)
    return {
        "eval/loss": nll / weight if weight else math.nan,
        "eval/mean_token_accuracy": correct / max(tokens, 1),
        "eval/turns_ended": ended / max(turns, 1),
    }


def sample_answers(
    run: Run, model: PackedLM, held_out: HeldOut, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Greedy answers to the held-out prompts, each rank taking its share.

    Returns `eval/exact_match` (share equal to the expected answer, end token included) and `eval/samples_ended` (share
    that ended within the limit), and for every prompt the texts prompt, expected and answer; nothing without prompts.
    Raises Interrupted, on all ranks alike, when a signal asks the run to leave.
    """
    if not held_out.prompts:
        return {}, []

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    def answer_all(prompts: list[list[int]]) -> list[list[int]]:
        drawn = model.sample(prompts, held_out.max_new_tokens, stop=lambda: run.stop_signal is not None)
        if run.should_stop():
            raise Interrupted("stopped in an evaluation")
        return drawn

    answers = run.spread(held_out.prompts, answer_all)
    exact = [answer == expected for answer, expected in zip(answers, held_out.answers, strict=True)]
    ended = [bool(answer) and answer[-1] == model.end_token for answer in answers]
    texts = [
        {"prompt": text(prompt), "expected": text(expected), "answer": text(answer)}
        for prompt, expected, answer in zip(held_out.prompts, held_out.answers, answers, strict=True)
    ]
    return {"eval/exact_match": sum(exact) / len(exact), "eval/samples_ended": sum(ended) / len(ended)}, texts


HOW_TO_READ_SFT = """
Losses are nats per supervised token, exact over all GPUs; `train` values are of one step's rows alone and jump.

- **eval/loss** falls while the model learns what carries over. When it rises and `train/loss` falls on, rows are learnt
  by heart: fewer epochs, a lower `optim.lr`, more or other data.
- **eval/turns_ended** should come near 1: below, answers run on. Look at `eval/samples_ended` and at the samples.
- **eval/exact_match** tells something of short answers with one right form; of free text the samples do.
- **train/grad_norm** is taken before clipping. Where it climbs together with the loss, lower `optim.lr`; updates that
  were left out are counted in **train/skipped_steps**, and their rows are in `incidents.jsonl`.
"""


# Pairs ---------------------------------------------------------------------------------------------------------------

SIDES = ("chosen", "rejected")


def hold_out_pairs(data: TokenDataset, config: DPOConfig, world_size: int) -> HeldOut:
    """Held-out pairs of `data`; the first `run.eval_samples` prompts are answered, the chosen answer is expected."""
    share_prompt = config.reference.share_prompt
    first = data.dataset[: config.run.eval_samples]
    lengths = packed_lengths(data.dataset, share_prompt)
    return HeldOut(
        lengths=lengths,
        collate=collate_preferences(data.dataset, share_prompt),
        plan=_plan(lengths, config, world_size),
        prompts=first["prompt_ids"],
        answers=first["chosen_ids"],
        max_new_tokens=config.run.eval_sample_tokens,
    )


def preference_metrics(prefix: str, sums: Sequence[float]) -> dict[str, float]:
    """Means over the pairs that `metric_sums` summed, under their full names."""
    return {f"{prefix}/{name}": value for name, value in metrics_from_sums(sums).items()}


@torch.no_grad()
def evaluate_dpo(
    run: Run, model: PackedLM, held_out: HeldOut, ref_logps: RefLogps, config: LossConfig
) -> dict[str, float]:
    """Exact means over all held-out pairs, by the names of training: `eval/loss`, `eval/rewards/accuracies` ...

    Raises Interrupted, on all ranks alike, when a signal asks the run to leave.
    """
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=run.device)
    for batch in _in_evaluation(run, model, held_out):
        reference = ref_logps(batch)
        pairs = score_pairs(model(batch).logps, reference, batch)
        sums += metric_sums(pairs, preference_loss(pairs, config), config)
    return preference_metrics("eval", run.sum(sums))


def change_since_start(progress: Progress, values: Mapping[str, float]) -> dict[str, float]:
    """`eval/logps/chosen_change` and `rejected_change` of a loss without a reference: since the first evaluation.

    `values` are this evaluation's; nothing where the reference told them already. `progress` keeps the first one's.
    """
    if "eval/logps/chosen_change" in values:
        return {}
    now = {side: value for side in SIDES if math.isfinite(value := values.get(f"eval/logps/{side}", math.nan))}
    progress.start_logps = progress.start_logps or now
    return {
        f"eval/logps/{side}_change": now[side] - start for side, start in progress.start_logps.items() if side in now
    }


def under(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """`eval/loss` as `eval/sft/loss`, with the prefix `eval/sft`."""
    return {name.replace("eval", prefix, 1): value for name, value in values.items()}


def sample_reference(
    run: Run, reference: Reference, held_out: HeldOut, tokenizer: PreTrainedTokenizerBase
) -> list[str] | None:
    """The reference's greedy answers to the held-out prompts, the same at every step; None without a reference."""
    if reference.source is None:
        return None
    with reference.active() as frozen:
        _, texts = sample_answers(run, frozen, held_out, tokenizer)
    return [text["answer"] for text in texts]


def side_by_side(texts: list[dict[str, str]], references: list[str] | None) -> list[dict[str, str]]:
    """What `sample_answers` gave for the policy with the reference's answers beside it."""
    rows = [{"prompt": text["prompt"], "chosen": text["expected"], "policy": text["answer"]} for text in texts]
    if references is None:
        return rows
    return [row | {"reference": answer} for row, answer in zip(rows, references, strict=True)]


HOW_TO_READ_DPO = """
Everything is a mean over pairs, exact over all GPUs; log-probabilities (nats) are sums over an answer's tokens.

- **rewards/accuracies**: pairs whose chosen answer gained more than the rejected one, seen from the reference. 0 before
  the first step (nothing has moved). **logps/accuracies**: pairs whose chosen answer is the likelier one; needs no
  reference, and long answers have it harder.
- **rewards/margins** grows while the model learns; on held-out pairs it levels off where learning ends. When
  `train` grows on and `eval` falls: fewer epochs, a lower `optim.lr`, a larger `loss.beta`.
- **logps/chosen_change**: what the chosen answers gained since the start. Far below 0 both answers are being unlearnt
  (likelihood displacement), and the mass goes to answers nobody asked for: look at the samples; lower `optim.lr`, give
  `loss.sft_weight`, or take `loss.name: apo_zero`.
- **rewards/saturated**: pairs with a margin over 4.6, whose gradient is under 1 % of its largest: near 1 the data
  teaches nothing more.
- **rewards/length_correlation**: of the margin with the difference in length. Near 1 (-1) what is learnt may be "longer
  (shorter) is better": compare the samples' lengths, take `loss.name: sigmoid_norm`, or pairs of like length.
- **eval/sft/**: the skills of before, on conversations of `data.eval_sft`; they should not fall.
"""
