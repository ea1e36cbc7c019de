"""The step stream: which rows a step holds, how they are spread, and that nothing but (seed, step) decides."""

import contextlib
import copy
import itertools
import os
import re
import signal
import statistics
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_train.config import BatchConfig, DataConfig, RunConfig, SFTConfig
from qwen_train.data import stream as stream_module
from qwen_train.data.packing import TENSOR_FIELDS, Batch, pack_sequences
from qwen_train.data.stream import (
    MicroBatches,
    Stream,
    collate_conversations,
    collate_preferences,
    packed_lengths,
    packed_squares,
    plan_microbatches,
    prefetch,
)
from qwen_train.train import evaluate

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(2, 40, 101)
SEQUENCES = [
    (RNG.integers(0, 1000, length), np.r_[0, RNG.integers(0, 3, length - 1) / 2].astype(np.float32))
    for length in LENGTHS
]
WEIGHTS = np.array([weights.sum() for _, weights in SEQUENCES], dtype=np.float32)


def collate(rows) -> Batch:
    return pack_sequences([SEQUENCES[row] for row in rows], rows)


def make(*, sequences_per_step=8, seed=1, epochs=None, steps=None, shuffle=True, **fields) -> Stream:
    """Without `epochs` it wraps for ever."""
    config = SFTConfig(
        data=DataConfig(train="x", shuffle=shuffle),
        batch=BatchConfig(sequences_per_step=sequences_per_step),
        run=RunConfig(seed=seed, epochs=epochs, steps=steps or (None if epochs else 10**9)),
    )
    defaults = dict(lengths=LENGTHS, total_weights=WEIGHTS, collate=collate, tokens_per_microbatch=64)
    sources = np.zeros(len(fields.get("lengths", LENGTHS)), dtype=np.int32)
    return Stream(config, **{**defaults, "sources": sources, "source_weights": [1.0], **fields})


def held(stream: Stream, steps) -> list[int]:
    """Rows in the batches themselves, of every rank of the stream's world."""
    ranks = [copy.copy(stream) for _ in range(stream.world_size)]
    for rank, one in enumerate(ranks):
        one.rank = rank
    return [row for step in steps for one in ranks for batch in one[step].batches for row in batch.rows]


def assert_same(one: MicroBatches, other: MicroBatches) -> None:
    for name in ("total_weight", "num_tokens", "num_sequences", "mean_length", "epoch"):
        assert getattr(one, name) == getattr(other, name), name
    for a, b in zip(one.batches, other.batches, strict=True):
        assert (a.rows, a.max_q, a.max_k, a.num_sequences) == (b.rows, b.max_q, b.max_k, b.num_sequences)
        for name in TENSOR_FIELDS:
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None and y is None) or (torch.equal(x, y) and x.dtype == y.dtype), name


# ---- which rows ----


@pytest.mark.parametrize(("world_size", "budget"), [(1, 64), (1, 10**6), (2, 64), (4, 50)])
def test_every_row_once_an_epoch_and_every_token(world_size, budget):
    stream = make(world_size=world_size, tokens_per_microbatch=budget, epochs=1)
    steps = range(stream.total_steps)
    assert len(steps) == 13  # 101 rows in eights
    assert sorted(held(stream, steps)) == list(range(101))
    assert sum(stream[step].num_tokens for step in steps) == LENGTHS.sum()
    assert sum(stream[step].num_sequences for step in steps) == 101
    # Negative control: with one step left out the same question has another answer.
    assert sorted(held(stream, steps[1:])) != list(range(101))


def test_each_of_three_epochs_holds_every_row_in_another_order():
    stream = make(epochs=3, sequences_per_step=101)
    epochs = [stream.rows(step) for step in range(3)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_step_holds_the_same_rows_whatever_the_world_and_the_budget():
    steps = range(30)
    plain, rows = [make()[step] for step in steps], [make().rows(step) for step in steps]
    for world_size in (1, 2, 3, 4):
        for budget in (40, 64, 1000):
            for rank in range(world_size):
                stream = make(world_size=world_size, rank=rank, tokens_per_microbatch=budget)
                for step in steps:
                    share = stream[step]
                    expected = plain[step]
                    assert stream.rows(step) == rows[step]
                    assert share.total_weight == expected.total_weight
                    assert (share.num_tokens, share.epoch) == (expected.num_tokens, expected.epoch)
            for step in steps:
                whole = held(make(world_size=world_size, tokens_per_microbatch=budget), [step])
                assert Counter(whole) == Counter(rows[step])
    assert [make(seed=2).rows(step) for step in steps] != rows  # negative control


def test_a_step_is_the_same_however_it_is_reached():
    straight = make()
    forward = [straight[step] for step in range(40)]  # three epochs
    backward = make()
    for step in reversed(range(40)):
        assert_same(backward[step], forward[step])
    for first in (1, 20, 25, 26):  # a fresh process: within epoch 1, again within it, across its end
        assert_same(make()[first], forward[first])
    with pytest.raises(AssertionError):
        assert_same(make()[3], forward[4])  # negative control


def test_a_seed_of_its_own_for_each_epoch():
    """(seed 1, epoch 2) and (seed 2, epoch 1) must not be the same permutation, as seed + epoch would have it."""
    orders = {tuple(make(seed=seed, sequences_per_step=101).rows(epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_without_shuffle_rows_keep_the_order_of_the_file():
    stream = make(shuffle=False, epochs=2)
    rows = [row for step in range(stream.total_steps) for row in stream.rows(step)]
    assert rows == [*range(101), *range(101)]


def test_runs_by_epochs_end_with_a_smaller_step_and_runs_by_steps_wrap():
    stream = make(epochs=1)
    assert [stream[step].num_sequences for step in range(13)] == [8] * 12 + [5]
    assert stream[12].epoch == 1.0
    # The loss of the smaller step is divided by its own tokens.
    assert stream[12].total_weight == pytest.approx(float(stream.total_weights[stream.rows(12)].sum()))
    for outside in (13, -1):
        with pytest.raises(IndexError):
            stream[outside]
    endless = make()
    assert endless[12].num_sequences == 8 and endless[12].epoch == 104 / 101
    assert endless.rows(12)[:5] == stream.rows(12)
    assert endless.rows(12)[5:] == make(sequences_per_step=101).rows(1)[:3]
    assert make(epochs=0.5).total_steps == 7  # 50.5 rows are 51
    assert sum(make(epochs=0.5)[step].num_sequences for step in range(7)) == 51
    with pytest.raises(
        ValueError, match=r"^run.epochs: 1e-09 of 101 rows are 0 steps; a run has 1 to 1,000,000,000: raise run.epochs$"
    ):
        make(epochs=1e-9)
    with pytest.raises(ValueError, match=r"^run.epochs: 1000000000.0 of 101 rows are 12,625,000,000 steps; .*: lower"):
        make(epochs=1e9)
    assert make(epochs=2).total_steps == 26 and make(steps=7).total_steps == 7
    assert make(lengths=LENGTHS[:10], total_weights=WEIGHTS[:10], sequences_per_step=1, epochs=1.1).total_steps == 11


def test_a_step_may_be_larger_than_the_data():
    stream = make(lengths=LENGTHS[:3], total_weights=WEIGHTS[:3], sequences_per_step=8)
    assert Counter(stream.rows(0) + stream.rows(1) + stream.rows(2)) == {0: 8, 1: 8, 2: 8}
    once = make(lengths=LENGTHS[:3], total_weights=WEIGHTS[:3], sequences_per_step=8, epochs=1)
    assert sorted(once.rows(0)) == [0, 1, 2] and once.total_steps == 1
    said = "batch.sequences_per_step: a step of 8 holds each of 3 rows 2.7 times; lower it, or give more rows"
    assert stream.repeats == said and once.repeats is None
    twice = make(lengths=LENGTHS[:3], total_weights=WEIGHTS[:3], sequences_per_step=8, epochs=2)
    assert twice.repeats == said.replace("step of 8", "step of 6").replace("2.7", "2.0")
    assert make(lengths=LENGTHS[:8], total_weights=WEIGHTS[:8], sequences_per_step=8, epochs=2).repeats is None


# ---- mixes ----


def test_sources_are_mixed_by_weight():
    sources = np.repeat([0, 1, 2, 3], [40, 20, 31, 10])
    stream = make(sources=sources, source_weights=[2.5, 0.25, 1, 0])
    assert stream.rows_per_epoch == 2.5 * 40 + 0.25 * 20 + 31
    stream = make(sources=sources, source_weights=[2.5, 0.25, 1, 0], sequences_per_step=stream.rows_per_epoch)
    drawn = []
    for step in range(6):
        counts = Counter(stream.rows(step))
        copies = [[counts[row] for row in np.flatnonzero(sources == source)] for source in range(4)]
        assert Counter(copies[0]) == {2: 20, 3: 20}
        assert Counter(copies[1]) == {0: 15, 1: 5}
        assert copies[2] == [1] * 31 and copies[3] == [0] * 10
        drawn.append(tuple(copies[0]))
    assert len(set(drawn)) == 6  # the fraction is drawn anew each epoch


def mixed(sources, source_weights, **fields) -> Stream:
    rows = len(sources)
    return make(lengths=LENGTHS[:rows], total_weights=WEIGHTS[:rows], sources=sources, source_weights=source_weights,
                **fields)  # fmt: skip


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("weights", "num_rows"), [((1, 0.1), 3), ((1, 0.5), 3), ((1.25, 2.3), 7), ((0.7, 0.29), 5)])
def test_a_fraction_of_a_row_is_carried_over_to_later_epochs(weights, num_rows, shuffle):
    """3 rows at 0.1 over 20 epochs were shown 0 times instead of 6."""
    sources = np.repeat([0, 1], [40, num_rows])
    stream = mixed(sources, weights, epochs=20, shuffle=shuffle)
    rows = [row for step in range(stream.total_steps) for row in stream.rows(step)]
    for source, count in ((0, 40), (1, num_rows)):
        shown = sum(sources[row] == source for row in rows)
        assert shown == round(20 * Fraction(str(weights[source])) * count), "as many as expected, to half a row"
    assert stream[stream.total_steps - 1].epoch == 20
    shown_by = [stream.passes(position) for position in range(len(rows) + 1)]
    assert shown_by == sorted(shown_by) and shown_by[-1] == 20
    begins = [stream._num_positions(epoch) for epoch in range(21)]
    for first, following in itertools.pairwise(begins):
        copies = Counter(rows[first:following])
        for source, count in ((0, 40), (1, num_rows)):
            members = [copies[row] for row in np.flatnonzero(sources == source)]
            assert {*members} <= {int(weights[source]), int(weights[source]) + 1}, (
                "a row at most once more than another"
            )
            assert abs(sum(members) - weights[source] * count) < 1
    late = mixed(sources, weights, epochs=20, shuffle=shuffle)
    assert late.rows(stream.total_steps - 3) == stream.rows(stream.total_steps - 3), "a pure function of the step"


def test_whole_shares_are_what_they_were():
    """Where every epoch holds as many rows, the rows of a step are those of before fractions were carried over."""
    stream = mixed(np.repeat([0, 1], [40, 60]), (1, 0.5), sequences_per_step=70, seed=3)
    generator = np.random.default_rng((3, 1))
    copies = np.repeat([1, 0], [40, 60])
    copies[generator.choice(np.arange(40, 100), size=30, replace=False)] += 1
    order = np.repeat(np.arange(100), copies)
    generator.shuffle(order)
    assert stream.rows(1) == order.tolist() and (stream[1].epoch, stream.rows_per_epoch) == (2.0, 70)


def test_a_mix_without_shuffle_keeps_the_order_of_the_file():
    stream = make(
        lengths=LENGTHS[:4], total_weights=WEIGHTS[:4], sources=[0, 0, 1, 1], source_weights=[1, 2],
        shuffle=False, sequences_per_step=6,
    )  # fmt: skip
    assert stream.rows(0) == stream.rows(1) == [0, 1, 2, 2, 3, 3]


def test_an_empty_epoch_is_refused():
    with pytest.raises(ValueError, match=r"data\.train: an epoch holds no rows"):
        make(source_weights=[0.0])
    with pytest.raises(ValueError, match=r"data\.train: an epoch holds no rows"):
        make(lengths=LENGTHS[:0], total_weights=WEIGHTS[:0])


# ---- what attention costs ----


def test_the_mean_length_is_that_of_a_token_and_of_all_ranks():
    """A mean sequence of three of 200 tokens and one of 4,096 has 1,174; a mean token stands in one of 3,598."""
    lengths = np.array([200, 200, 200, 4096])
    rows = [(np.zeros(length), np.r_[0, np.ones(length - 1)]) for length in lengths]
    collate = lambda members: pack_sequences([rows[member] for member in members], members)  # noqa: E731
    for rank in range(2):
        step = make(lengths=lengths, total_weights=lengths - 1, collate=collate, sequences_per_step=4, epochs=1,
                    tokens_per_microbatch=4096, rank=rank, world_size=2)[0]  # fmt: skip
        assert step.mean_length == pytest.approx((3 * 200**2 + 4096**2) / 4696)
        assert step.batches[0].mean_length == pytest.approx((4096, 200)[rank]), "not of one rank's share"
        assert collate(range(4)).mean_length == pytest.approx(step.mean_length)


# ---- how they are spread ----


def test_a_plan_by_hand():
    # 15 tokens want two of 8. Greedy: 5 | 4, 3 to the second (7), 3 to the first (8).
    assert [members.tolist() for members in plan_microbatches(np.array([5, 4, 3, 3]), 8, 1)] == [[0, 3], [1, 2]]
    # Over two ranks of budget 5: 5, 4, then 3 and 3 fit nowhere, so four; over three ranks, six, one of them empty.
    assert [members.tolist() for members in plan_microbatches(np.array([5, 4, 3, 3]), 5, 2)] == [[0], [1], [2], [3]]
    assert [members.tolist() for members in plan_microbatches(np.array([5, 4, 3, 3]), 5, 3)][4:] == [[], []]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=0, max_size=60), st.integers(50, 200), st.integers(1, 5))
def test_plans_are_complete_within_budget_and_even(lengths, budget, world_size):
    lengths = np.array(lengths, dtype=np.int64)
    plan = plan_microbatches(lengths, budget, world_size)
    assert len(plan) % world_size == 0 and len(plan) > 0
    assert sorted(member for members in plan for member in members) == list(range(len(lengths)))
    sizes = [int(lengths[members].sum()) for members in plan]
    assert max(sizes) <= budget and sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= lengths.max(initial=0)  # what the greedy promises
    fewest = world_size * max(1, -(-int(lengths.sum()) // (budget * world_size)))
    assert fewest <= len(plan) <= 2 * fewest  # with half of each micro-batch empty the greedy cannot fail


def plan_by_ones(lengths: np.ndarray, budget: int, world_size: int) -> list[list[int]]:
    """The smallest number of micro-batches by which the greedy fits, found by trying every one: how resumed runs cut
    the steps they have trained."""
    count = world_size * max(1, -(-int(lengths.sum()) // (budget * world_size)))
    while True:
        bins, tokens = [[] for _ in range(count)], [0] * count
        for member in np.argsort(-lengths, kind="stable").tolist():
            index = tokens.index(min(tokens))
            bins[index].append(member)
            tokens[index] += int(lengths[member])
        if max(tokens) <= budget:
            return [sorted(bins[index]) for index in sorted(range(count), key=lambda index: (-tokens[index], index))]
        count += world_size


def lists(plan) -> list[list[int]]:
    return [members.tolist() for members in plan]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120), st.integers(1, 5))
def test_a_step_is_cut_by_the_smallest_number_that_fits(lengths, budget, world_size):
    lengths = np.array(lengths, dtype=np.int64)
    assert lists(plan_microbatches(lengths, budget, world_size)) == plan_by_ones(lengths, budget, world_size)


def near_budget(num_rows: int, shape: str) -> np.ndarray:
    """Lengths of which a budget of 2,048 tokens holds one, two, or one to a few."""
    rng = np.random.default_rng(num_rows)
    if shape == "log-normal":
        return np.clip(rng.lognormal(6.3, 0.9, num_rows).astype(np.int64), 1, 2048)
    return rng.integers(
        *{"over half": (1025, 2049), "under half": (900, 1024), "over a third": (700, 800)}[shape], num_rows
    )


SHAPES = ["log-normal", "over half", "under half", "over a third"]


@pytest.mark.parametrize("shape", SHAPES)
def test_two_hundred_micro_batches_a_rank_are_cut_by_the_smallest_number(shape):
    lengths = near_budget(390, shape)
    expected = plan_by_ones(lengths, 2048, 2)
    assert 140 < len(expected) <= 400
    assert lists(plan_microbatches(lengths, 2048, 2)) == expected


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_of_a_whole_data_set_takes_few_attempts(shape, world_size, monkeypatch):
    """One by one from the sum of the tokens on, the rows over half the budget alone take 5,000 attempts and minutes."""
    counts: list[int] = []
    spread = stream_module._spread_greedily
    monkeypatch.setattr(stream_module, "_spread_greedily", lambda *args: (counts.append(args[-1]), spread(*args))[1])
    lengths = near_budget(20_000, shape)
    plan = plan_microbatches(lengths, 2048, world_size)
    assert len(counts) <= 80 and counts[-1] == len(plan), counts
    assert all(after - before <= max(world_size, before / 100) for before, after in itertools.pairwise(counts))
    assert len(plan) % world_size == 0
    assert np.array_equal(np.sort(np.concatenate(plan)), np.arange(20_000))
    assert max(int(lengths[members].sum()) for members in plan) <= 2048
    if shape == "over half":
        assert len(plan) == 20_000 and len(counts) == 1


def test_every_rank_gets_as_many_micro_batches_of_like_size():
    ranks = [make(world_size=4, rank=rank, sequences_per_step=32) for rank in range(4)]
    for step in range(20):
        shares = [stream[step] for stream in ranks]
        assert len({len(share.batches) for share in shares}) == 1
        for together in zip(*(share.batches for share in shares), strict=True):
            sizes = [batch.num_tokens for batch in together]
            assert max(sizes) <= 64 and max(sizes) - min(sizes) < 32
        assert shares[0].batches[0].num_tokens == max(batch.num_tokens for share in shares for batch in share.batches)


def test_ranks_without_work_get_the_empty_batch():
    shares = [make(world_size=4, rank=rank, sequences_per_step=2, tokens_per_microbatch=1000)[0] for rank in range(4)]
    assert [[batch.num_sequences for batch in share.batches] for share in shares] == [[1], [1], [0], [0]]
    assert all(share.num_sequences == 2 and share.num_tokens == shares[0].num_tokens for share in shares)


def test_totals_are_those_of_all_ranks_and_a_mean_of_means_is_not():
    for step in range(20):
        shares = [make(world_size=3, rank=rank)[step] for rank in range(3)]
        batches = [batch for share in shares for batch in share.batches]
        weights = [batch.weights for batch in batches]
        for share in shares:
            assert share.total_weight == pytest.approx(float(torch.cat(weights).sum()), rel=1e-6)
            assert share.num_tokens == sum(batch.num_tokens for batch in batches if batch.num_sequences)
        # Some loss a token: sums divided once by the global number are the weighted mean over the step's tokens ...
        losses = [batch.targets.float() for batch in batches]
        summed = sum(float((w * x).sum()) for w, x in zip(weights, losses, strict=True)) / shares[0].total_weight
        rows = [SEQUENCES[row] for row in make().rows(step)]
        expected = sum(float((w * ids).sum()) for ids, w in rows) / sum(float(w.sum()) for _, w in rows)
        assert summed == pytest.approx(expected, rel=1e-5)
        # ... and the mean of micro-batch means is another number, since micro-batches are uneven.
        means = [float((w * x).sum() / w.sum()) for w, x in zip(weights, losses, strict=True) if len(w)]
        assert statistics.mean(means) != pytest.approx(expected, rel=1e-4)


def test_a_row_longer_than_a_micro_batch_is_refused_with_its_length():
    lengths = LENGTHS.copy()
    lengths[17] = 65
    with pytest.raises(ValueError, match=r"row 17 .* 65 tokens.* only 64; raise batch\.tokens_per_microbatch to 65"):
        make(lengths=lengths)
    make(lengths=lengths, tokens_per_microbatch=65)


def test_a_step_costs_the_same_on_a_thousand_and_a_million_rows():
    def seconds(num_rows: int) -> float:
        stream = make(
            lengths=np.full(num_rows, 20), total_weights=np.ones(num_rows), sequences_per_step=64,
            collate=lambda rows: pack_sequences([SEQUENCES[row % 101] for row in rows], rows),
        )  # fmt: skip
        stream[0]  # draws the epoch's permutation
        taken = []
        for step in range(15):
            start = time.perf_counter()
            stream[step % 10]
            taken.append(time.perf_counter() - start)
        return min(taken)

    small, large = seconds(10**3), seconds(10**6)
    assert large < 3 * small + 1e-3, (small, large)


# ---- evaluation ----


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_holds_every_row_once_over_all_ranks(world_size, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluating", lambda model: contextlib.nullcontext())
    plan = plan_microbatches(LENGTHS, 64, world_size)
    held_out = evaluate.HeldOut(LENGTHS, collate, plan, prompts=[], answers=[], max_new_tokens=1)

    def batches(rank: int) -> list[Batch]:
        run = SimpleNamespace(rank=rank, world_size=world_size, device="cpu", should_stop=lambda: False)
        return list(evaluate._in_evaluation(run, None, held_out))

    ranks = [batches(rank) for rank in range(world_size)]
    assert sorted(row for rank in ranks for batch in rank for row in batch.rows) == list(range(101))
    assert len({len(rank) for rank in ranks}) == 1
    assert all(batch.num_tokens <= 64 for rank in ranks for batch in rank)
    assert [batch.rows for batch in batches(0)] == [batch.rows for batch in ranks[0]]


# ---- from the tokenised data set ----


def ints(lists) -> list[np.ndarray]:
    return [np.asarray(values, dtype=np.int32) for values in lists]


def conversations(num_rows: int = 20) -> datasets.Dataset:
    lengths = LENGTHS[:num_rows]
    return datasets.Dataset.from_dict(
        {
            "input_ids": ints(ids for ids, _ in SEQUENCES[:num_rows]),
            "span_starts": ints([1, length // 2 + 1][: row % 3] for row, length in enumerate(lengths)),
            "span_ends": ints([length // 2, length][: row % 3] for row, length in enumerate(lengths)),
            "span_weights": [np.array([1.0, 0.5][: row % 3], dtype=np.float32) for row in range(num_rows)],
            "length": lengths.astype(np.int32),
            "row": np.arange(num_rows),
        },
        features=datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int32")),
                "span_starts": datasets.List(datasets.Value("int32")),
                "span_ends": datasets.List(datasets.Value("int32")),
                "span_weights": datasets.List(datasets.Value("float32")),
                "length": datasets.Value("int32"),
                "row": datasets.Value("int64"),
            }
        ),
    )


def test_conversations_from_columns():
    dataset = conversations()
    rows = [4, 0, 5, 5, 19]  # 1 span, none, 2 spans, the same again, 1 span
    batch = collate_conversations(dataset)(rows)
    sequences = []
    for row in rows:
        weights = np.zeros(LENGTHS[row], dtype=np.float32)
        spans = (dataset[row][f"span_{x}"] for x in ("starts", "ends", "weights"))
        for start, end, weight in zip(*spans, strict=True):
            weights[start:end] = weight
        sequences.append((SEQUENCES[row][0], weights))
    expected = pack_sequences(sequences, rows)
    assert {0.5, 1.0} == set(expected.weights.tolist())
    for name in TENSOR_FIELDS:
        x, y = getattr(batch, name), getattr(expected, name)
        assert (x is None and y is None) or torch.equal(x, y), name
    assert batch.rows == tuple(rows) and batch.num_sequences == 5
    assert collate_conversations(dataset)([]).num_sequences == 0
    assert packed_lengths(dataset).tolist() == LENGTHS[:20].tolist()
    # Rows of one length come as a matrix from datasets, and a filtered data set goes through an index.
    assert collate_conversations(dataset)([5, 5]).num_tokens == 2 * LENGTHS[5]
    chosen = dataset.select([7, 3])
    assert collate_conversations(chosen)([1]).input_ids.tolist() == SEQUENCES[3][0].tolist()
    assert packed_lengths(chosen).tolist() == LENGTHS[[7, 3]].tolist()


def preferences() -> datasets.Dataset:
    ids = [sequence for sequence, _ in SEQUENCES if len(sequence) >= 6][:20]
    thirds = [(s[: len(s) // 2], s[len(s) // 2 : -1], s[-1:]) for s in ids]
    feature = datasets.List(datasets.Value("int32"))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns = {name: ints(parts) for name, parts in zip(names, zip(*thirds, strict=True), strict=True)}
    return datasets.Dataset.from_dict(
        {**columns, "length": [len(s) for s in ids]},
        features=datasets.Features(dict.fromkeys(names, feature) | {"length": datasets.Value("int32")}),
    )


@pytest.mark.parametrize("share", [True, False])
def test_preferences_from_columns(share):
    dataset = preferences()
    lengths = packed_lengths(dataset, share_prompt=share)
    collate_pairs = collate_preferences(dataset, share)
    assert [collate_pairs([row]).num_tokens for row in range(20)] == lengths.tolist()
    assert [collate_pairs([row]).num_tokens for row in range(20)] == [
        dataset[row]["length"] + (0 if share else len(dataset[row]["prompt_ids"])) for row in range(20)
    ]
    chosen = dataset.select([11, 2, 7])
    assert packed_lengths(chosen, share).tolist() == lengths[[11, 2, 7]].tolist()
    stream = make(
        lengths=lengths, total_weights=np.ones(20), collate=collate_pairs, sequences_per_step=6,
        tokens_per_microbatch=100, seed=0, epochs=1, world_size=2,
    )  # fmt: skip
    step = stream[3]
    assert (step.num_sequences, step.total_weight) == (2, 2.0)
    squares = packed_squares(dataset, share)
    assert collate_pairs([0, 4]).mean_length == pytest.approx(squares[[0, 4]].sum() / lengths[[0, 4]].sum())
    long = [len(dataset[1][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    attended = sum(  # by every token, itself included
        sum(range(first + 1, first + added + 1))
        for first, added in [(0, long[0]), (long[0], long[1]), *([] if share else [(0, long[0])]), (long[0], long[2])]
    )
    assert squares[1] + lengths[1] == 2 * attended
    for batch in step.batches:
        assert batch.num_sequences == 2 * len(batch.rows)
        for i, row in enumerate(batch.rows):
            assert batch.targets[batch.sequence_ids == 2 * i].tolist() == dataset[row]["chosen_ids"]
            assert batch.targets[batch.sequence_ids == 2 * i + 1].tolist() == dataset[row]["rejected_ids"]
    assert (collate_pairs([]).kv_index is None) == (not share)


# ---- ahead of the step ----


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_prefetching_changes_nothing_but_the_time(workers):
    stream = make(epochs=2)
    steps = range(5, stream.total_steps)
    before = torch.get_rng_state()
    got = list(prefetch(stream, steps, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [step for step, _ in got] == list(steps)
    for step, microbatches in got:
        assert_same(microbatches, stream[step])
    assert list(prefetch(stream, range(0), workers=workers)) == []


def test_the_budget_is_halved_down_to_the_longest_row():
    stream = make(tokens_per_microbatch=130)
    assert stream.halve_budget() and stream.tokens_per_microbatch == 65
    assert stream.halve_budget() and stream.tokens_per_microbatch == LENGTHS.max() == 39
    assert not stream.halve_budget() and stream.tokens_per_microbatch == 39
    assert_same(stream[3], make(tokens_per_microbatch=39)[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_after_a_halved_budget_are_cut_by_it(workers):
    """Workers hold the next four steps already, cut by the old one; none is lost and none comes twice."""
    stream, before = make(tokens_per_microbatch=160), children()
    got = []
    for step, microbatches in prefetch(stream, range(2, 14), workers=workers):
        got.append((step, microbatches))
        if step in (4, 9):
            assert stream.halve_budget()
    assert [step for step, _ in got] == list(range(2, 14)) and children() == before
    for step, microbatches in got:
        budget = 160 if step <= 4 else 80 if step <= 9 else 40
        assert_same(microbatches, make(tokens_per_microbatch=budget)[step])
        uncut = make(tokens_per_microbatch=160)[step]
        assert len(microbatches.batches) != len(uncut.batches) or step <= 4, "it does make a difference"


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_prefetched_batches_are_pinned(workers):
    stream = make()
    for step, microbatches in prefetch(stream, range(4), workers=workers):
        assert all(batch.input_ids.is_pinned() and batch.weights.is_pinned() for batch in microbatches.batches)
        on_gpu = [batch.to("cuda", non_blocking=True) for batch in microbatches.batches]
        for batch, expected in zip(on_gpu, stream[step].batches, strict=True):
            assert torch.equal(batch.input_ids.cpu(), expected.input_ids)


def test_conversations_are_prefetched_from_a_data_set():
    dataset = conversations(18)
    stream = make(lengths=packed_lengths(dataset), total_weights=np.ones(18), collate=collate_conversations(dataset))
    for step, microbatches in prefetch(stream, range(4), workers=2):
        assert_same(microbatches, stream[step])


def test_workers_end_with_the_loop_and_when_it_raises():
    stream = make()
    before = children()
    running = prefetch(stream, range(1000), workers=2)
    next(running)
    assert len(children() - before) == 2
    running.close()
    assert children() == before

    def loop() -> None:
        for step, _ in prefetch(stream, range(1000), workers=2):
            if step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    deadline = time.monotonic() + 10
    while children() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() == before


def test_workers_run_one_thread_and_leave_signals_to_the_main_process():
    def report(rows) -> Batch:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        ignored = [signal.getsignal(number) == signal.SIG_IGN for number in numbers]
        return pack_sequences([(np.array([os.getpid(), torch.get_num_threads(), *ignored]), np.zeros(5))], rows[:1])

    stream = make(collate=report)
    seen = [batch.input_ids.tolist() for _, share in prefetch(stream, range(6), 2) for batch in share.batches]
    assert len({pid for pid, *_ in seen} - {os.getpid()}) == 2
    assert all(rest == [1, 1, 1, 1] for _, *rest in seen)


def test_a_long_run_of_many_micro_batches_holds_no_file_descriptors():
    stream = make(sequences_per_step=64, tokens_per_microbatch=40)  # about 35 micro-batches a step
    kept, counts = [], []
    for _, microbatches in prefetch(stream, range(30), workers=2):
        kept.append(microbatches)  # a loop that falls behind
        counts.append(len(os.listdir("/proc/self/fd")))
    assert sum(len(microbatches.batches) for microbatches in kept) > 900
    assert max(counts) <= counts[0] + 4


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (
            signal.SIGKILL,
            "most often the machine is out of memory: lower data.workers (0 collates in the main process)",
        ),
        (signal.SIGUSR1, "start again, with fewer or none (0 collates in the main process)"),
    ],
)
def test_a_dead_worker_is_reported_with_the_remedy(number, remedy):
    """Memory is the kernel's reason to kill, and nobody else's."""
    main = os.getpid()

    def die(rows) -> Batch:
        if 50 in rows and os.getpid() != main:
            os.kill(os.getpid(), number)
        return collate(rows)

    before = children()
    reason = re.escape(f"is killed by signal: {signal.strsignal(number)}")
    with pytest.raises(RuntimeError, match=rf"data\.workers: a worker .* died \(.*{reason}\); {re.escape(remedy)}"):
        list(prefetch(make(collate=die), range(40), workers=2))
    assert children() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_mistake_crosses_over_as_one_line_and_a_bug_with_its_traceback(workers):
    def fail(error):
        def collate_or_fail(rows) -> Batch:
            if 50 in rows:
                raise error("cache: row 50 is damaged; delete the cache folder")
            return collate(rows)

        return list(prefetch(make(collate=collate_or_fail), range(40), workers=workers))

    with pytest.raises(ValueError) as mistake:
        fail(ValueError)
    assert str(mistake.value) == "cache: row 50 is damaged; delete the cache folder"
    with pytest.raises(RuntimeError, match="cache: row 50") as bug:
        fail(RuntimeError)
    assert "data.workers" not in str(bug.value)


def test_an_order_is_told_by_its_rows_and_by_where_epochs_begin():
    """Other weights move an epoch in the stream though its own rows may be the same."""
    rows = {"lengths": np.full(200, 5), "total_weights": np.ones(200), "sources": np.repeat([0, 1], 100)}
    some = [make(**rows, source_weights=weights, steps=2000) for weights in ([1, 0.5], [1, 0.5], [1, 0.504])]
    assert some[0].order_digest(40) == some[1].order_digest(40) != some[0].order_digest(500)
    assert all(some[0].order_digest(step) != some[2].order_digest(step) for step in range(0, 2000, 50))
