"""Step number -> this rank's micro-batches. Global batch ``step`` is a pure function of (seed, step) and the data set.

There is no loader state: resuming is asking for a later step, and another number of GPUs, another token budget or
another number of workers sees the same sequences in the same steps.
"""

import contextlib
import hashlib
import heapq
import math
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from qwen_train.config import MAX_STEPS, SFTConfig
from qwen_train.data.packing import Batch, FloatArray, IntArray, pack_pairs, pack_sequences, token_weights

Collate = Callable[[Sequence[int]], Batch]
"""Data set rows -> one packed row; no rows at all give the empty batch."""


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """One rank's share of a step, and the totals of the whole step over all ranks."""

    batches: list[Batch]
    """This rank's micro-batches, as many as every other rank's, the largest first; some may be empty."""

    total_weight: float
    """Summed weights of the supervised tokens of the global step (SFT), or its pairs (DPO)."""

    num_tokens: int
    """Packed tokens of the global step."""

    num_sequences: int
    """Conversations or pairs of the global step."""

    mean_length: float
    """Length of the sequence in which a mean token of the global step stands: what attention costs a token."""

    epoch: float
    """Passes over the data completed when this step is done."""


class Stream:
    """``stream[step]``: the micro-batches of one rank. Batches are consecutive stretches of the endless row of epochs.

    An epoch holds floor(w) copies of every row of a source with weight w and, for the fraction, a seeded subset of its
    rows that is drawn again each epoch. Where that is not a whole number of rows, epochs differ by a row, so that after
    each of them the rows shown so far are right to half a row. ``shuffle`` permutes an epoch by (seed, epoch),
    otherwise rows keep the file's order. With ``epochs`` the stream ends there and its last step may be smaller;
    without, it wraps for ever, and ``steps`` says how many of its steps the training takes.
    """

    def __init__(
        self,
        config: SFTConfig,
        *,
        lengths: IntArray,
        total_weights: FloatArray,
        collate: Collate,
        tokens_per_microbatch: int,
        sources: IntArray,
        source_weights: Sequence[float],
        squares: IntArray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """``lengths``: packed tokens of each row; ``total_weights``: what each row adds to the step's divisor;
        ``sources``: index into ``source_weights`` of each row; ``squares``: squared lengths of each row's sequences
        (None: a row is one sequence)."""
        self.lengths = np.asarray(lengths)
        self.total_weights = np.asarray(total_weights)
        self.squares = self.lengths.astype(np.int64) ** 2 if squares is None else squares
        self.collate = collate
        self.sequences_per_step = config.batch.sequences_per_step
        self.tokens_per_microbatch = tokens_per_microbatch
        self.seed = config.run.seed
        self.steps = config.run.steps
        self.epochs = None if self.steps else config.run.epochs or 1
        self.shuffle = config.data.shuffle
        self.sources = np.asarray(sources)
        self.source_weights = tuple(source_weights)
        self.rank = rank
        self.world_size = world_size
        self._orders: dict[int, IntArray] = {}
        assert len(self.lengths) == len(self.total_weights) == len(self.sources), "one entry a row"
        check_budget(self.lengths, tokens_per_microbatch)
        rows_of_source = np.bincount(self.sources, minlength=len(self.source_weights))
        assert len(rows_of_source) == len(self.source_weights), "a row of a source without a weight"
        amounts = [(Fraction(str(float(w))), int(n)) for w, n in zip(self.source_weights, rows_of_source, strict=True)]
        # rows of each source to draw in an epoch beside the whole copies, in the mean over epochs; exact, as
        # 0.29 x 100 in floats is less than 29
        self._fractions = [(weight % 1) * count for weight, count in amounts]
        self._whole_copies = sum(int(weight) * count for weight, count in amounts)
        self.rows_per_epoch = self._first_position(1)  # of the first; in later ones a source may have one more or less
        if self.rows_per_epoch == 0:
            raise ValueError(
                f"data.train: an epoch holds no rows ({len(self.lengths)} rows, weights {list(self.source_weights)}); "
                "raise the weights, or give more rows"
            )
        if not 0 < self.total_steps <= MAX_STEPS:
            raise ValueError(
                f"run.epochs: {self.epochs} of {self.rows_per_epoch:,} rows are {self.total_steps:,} steps; a run has "
                f"1 to {MAX_STEPS:,}: {'lower' if self.total_steps else 'raise'} run.epochs"
            )

    @property
    def total_steps(self) -> int:
        """Steps of the training: ``steps``, or those of ``epochs`` passes, the last one perhaps smaller."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return -(-self._num_positions(self.epochs) // self.sequences_per_step)

    @property
    def repeats(self) -> str | None:
        """How often a step holds each row, where that is more than once."""
        held = self.sequences_per_step
        if self.epochs is not None:
            held = min(held, self._num_positions(self.epochs))
        if held <= self.rows_per_epoch:
            return None
        return (
            f"batch.sequences_per_step: a step of {held:,} holds each of {self.rows_per_epoch:,} rows "
            f"{held / self.rows_per_epoch:.1f} times; lower it, or give more rows"
        )

    def rows(self, step: int) -> list[int]:
        """Data set rows of global batch ``step``, in the stream's order."""
        begin = step * self.sequences_per_step
        end = begin + self.sequences_per_step
        if self.epochs is not None:
            end = min(end, self._num_positions(self.epochs))
        if not 0 <= begin < end:
            raise IndexError(f"step {step} lies outside a stream of {self.epochs} epochs")
        rows: list[int] = []
        while begin < end:
            epoch = self._epoch_at(begin)
            position = begin - self._first_position(epoch)
            stretch = self._order(epoch)[position : position + end - begin]
            rows += stretch.tolist()
            begin += len(stretch)
        return rows

    def __getitem__(self, step: int) -> MicroBatches:
        rows = np.array(self.rows(step))
        plan = plan_microbatches(self.lengths[rows], self.tokens_per_microbatch, self.world_size)
        num_tokens = int(self.lengths[rows].sum(dtype=np.int64))
        return MicroBatches(
            batches=[self.collate(rows[members].tolist()) for members in plan[self.rank :: self.world_size]],
            total_weight=float(self.total_weights[rows].sum(dtype=np.float64)),
            num_tokens=num_tokens,
            num_sequences=len(rows),
            mean_length=int(self.squares[rows].sum()) / num_tokens,
            epoch=self.passes(step * self.sequences_per_step + len(rows)),
        )

    def passes(self, position: int) -> float:
        """Passes over the data completed when so many rows of the stream were shown."""
        epoch = self._epoch_at(position)
        first = self._first_position(epoch)
        num_rows = self._first_position(epoch + 1) - first
        return (epoch * num_rows + position - first) / num_rows

    def order_digest(self, step: int) -> str:
        """Hash of the order of the epoch that a step begins in, that numpy and this file give: neither is forever.

        And of the rows of an epoch by source, which say where each begins.
        """
        order = self._order(self._epoch_at(step * self.sequences_per_step))
        rows = f"{self._whole_copies} {[float(fraction) for fraction in self._fractions]}"
        return hashlib.sha256(order.astype(np.int64).tobytes() + rows.encode()).hexdigest()

    def halve_budget(self) -> bool:
        """Cut later steps into micro-batches of half as many tokens, but no fewer than the longest row has.

        Returns False where they hold no more than that already.
        """
        smaller = max(self.tokens_per_microbatch // 2, int(self.lengths.max()))
        changed = smaller < self.tokens_per_microbatch
        self.tokens_per_microbatch = smaller
        return changed

    def _num_positions(self, epochs: float) -> int:
        """Rows of the first ``epochs`` epochs; rounding keeps 1.1 epochs of 10 rows at 11 of them."""
        first, following = self._first_position(int(epochs)), self._first_position(int(epochs) + 1)
        return first + math.ceil(round((epochs - int(epochs)) * (following - first), 6))

    def _first_position(self, epoch: int) -> int:
        """Where an epoch begins in the stream: rows of all epochs before it."""
        return epoch * self._whole_copies + sum(round(epoch * fraction) for fraction in self._fractions)

    def _epoch_at(self, position: int) -> int:
        """The epoch that a position of the stream lies in; an epoch may be empty, that of a position is not."""
        epoch = int(position / (self._whole_copies + sum(self._fractions)))
        while self._first_position(epoch) > position:
            epoch -= 1
        while self._first_position(epoch + 1) <= position:
            epoch += 1
        return epoch

    def _order(self, epoch: int) -> IntArray:
        """Rows of one epoch in the order of the stream; kept for this epoch and the one before."""
        if epoch not in self._orders:
            generator = np.random.default_rng((self.seed, epoch))
            copies = np.array([int(weight) for weight in self.source_weights])[self.sources]
            for source, fraction in enumerate(self._fractions):
                if drawn := round((epoch + 1) * fraction) - round(epoch * fraction):
                    members = np.flatnonzero(self.sources == source)
                    copies[generator.choice(members, size=drawn, replace=False)] += 1
            order = np.repeat(np.arange(len(self.lengths)), copies)
            if self.shuffle:
                generator.shuffle(order)
            self._orders = {known: self._orders[known] for known in self._orders if known == epoch - 1} | {epoch: order}
        return self._orders[epoch]


def check_budget(lengths: IntArray, tokens_per_microbatch: int) -> None:
    """Refuse rows that no micro-batch can hold."""
    if len(lengths) and lengths.max() > tokens_per_microbatch:
        row = int(lengths.argmax())
        raise ValueError(
            f"batch.tokens_per_microbatch: row {row} of the tokenised data holds {int(lengths[row])} tokens, but a "
            f"micro-batch only {tokens_per_microbatch}; raise batch.tokens_per_microbatch to {int(lengths[row])} or "
            "more, or lower data.max_length"
        )


def plan_microbatches(lengths: IntArray, budget: int, world_size: int) -> list[IntArray]:
    """Spread sequences over few micro-batches, divisible by ``world_size``, that each hold <= ``budget`` tokens.

    Longest-processing-time greedy (Graham 1969): the longest sequence left goes to the emptiest micro-batch, so sizes
    are balanced. Up to 200 micro-batches a rank it is the smallest number by which the greedy fits; beyond, one that
    is at most 1 % larger than one that did not fit, so that a plan of a whole data set takes some dozens of attempts
    and not thousands. Returns the members of each micro-batch, the largest micro-batch first: rank r takes every
    ``world_size``-th from r on, so that what ranks compute at the same time is of like size, and running out of memory
    shows at once. Micro-batches may be empty. Pure in its arguments.
    """
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    assert not sizes or max(sizes) <= budget, "check_budget was not asked"
    alone = sum(2 * size > budget for size in sizes)  # no two of these share a micro-batch
    count = world_size * max(1, math.ceil(sum(sizes) / (budget * world_size)), math.ceil(alone / world_size))
    while (plan := _spread_greedily(sizes, longest_first, budget, count)) is None:
        count += world_size * max(1, count // (100 * world_size))
    return plan


def _spread_greedily(sizes: list[int], longest_first: list[int], budget: int, count: int) -> list[IntArray] | None:
    """`plan_microbatches` with `count` micro-batches; None where one of them would exceed the budget."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]  # (tokens, micro-batch): ties go to the lowest micro-batch
    for member in longest_first:
        tokens, index = heap[0]
        if tokens + sizes[member] > budget:
            return None
        heapq.heapreplace(heap, (tokens + sizes[member], index))
        bins[index].append(member)
    largest_first = sorted(heap, key=lambda entry: (-entry[0], entry[1]))
    return [np.array(sorted(bins[index]), dtype=np.int64) for _, index in largest_first]


# ---- from the tokenised data set to batches ----


def collate_conversations(dataset: Any) -> Collate:
    """Collator of the SFT columns: input_ids and spans of supervised tokens."""
    columns = dataset.with_format("numpy", columns=["input_ids", "span_starts", "span_ends", "span_weights"])

    def collate(rows: Sequence[int]) -> Batch:
        if not rows:
            return pack_sequences([], [])
        fetched = columns[rows]
        sequences = []
        spans = (fetched["span_starts"], fetched["span_ends"], fetched["span_weights"])
        for ids, starts, ends, span_weights in zip(fetched["input_ids"], *spans, strict=True):
            sequences.append((ids, token_weights(len(ids), zip(starts, ends, span_weights, strict=True))))
        return pack_sequences(sequences, rows)

    return collate


def collate_preferences(dataset: Any, share_prompt: bool) -> Collate:
    """Collator of the DPO columns: prompt, chosen and rejected ids."""
    columns = dataset.with_format("numpy", columns=["prompt_ids", "chosen_ids", "rejected_ids"])

    def collate(rows: Sequence[int]) -> Batch:
        if not rows:
            return pack_pairs([], [], share_prompt)
        fetched = columns[rows]
        pairs = list(zip(fetched["prompt_ids"], fetched["chosen_ids"], fetched["rejected_ids"], strict=True))
        return pack_pairs(pairs, rows, share_prompt)

    return collate


def packed_lengths(dataset: Any, share_prompt: bool = True) -> IntArray:
    """Packed tokens of each row: its ``length``, and the prompt once more for a pair that does not share it."""
    lengths = dataset.with_format("numpy", columns=["length"])[:]["length"].astype(np.int64)
    return lengths if share_prompt else lengths + _list_lengths(dataset, "prompt_ids")


def packed_squares(dataset: Any, share_prompt: bool) -> IntArray:
    """Squared lengths of the two sequences of each pair, summed; a shared prompt attends to itself once."""
    prompt, chosen, rejected = (_list_lengths(dataset, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
    return (prompt + chosen) ** 2 + (prompt + rejected) ** 2 - share_prompt * prompt**2


def _list_lengths(dataset: Any, name: str) -> IntArray:
    """Elements of each row's list, without reading the lists."""
    lists = dataset.with_format("arrow", columns=[name])[:].column(name)
    return np.concatenate([np.asarray(chunk.value_lengths()) for chunk in lists.chunks]).astype(np.int64)


# ---- collation ahead of the step ----


def prefetch(stream: Stream, steps: Sequence[int], workers: int) -> Iterator[tuple[int, MicroBatches]]:
    """``(step, stream[step])`` in the order of ``steps``, collated by worker processes ahead of the step.

    ``workers`` 0 collates in this process when the step is asked for. Each worker keeps two steps ready, runs one
    thread, and ends with this generator (``close()``, or the loop that holds it). After a ``halve_budget`` the steps to
    come are cut by the new budget. With CUDA batches lie in page-locked memory. torch's global random state is
    left alone.
    """
    if workers == 0:
        for step in steps:
            microbatches = stream[step]
            yield step, _pin(microbatches) if torch.cuda.is_available() else microbatches
        return
    done = 0
    while done < len(steps):
        budget = stream.tokens_per_microbatch
        with contextlib.closing(_collated_by_workers(stream, steps[done:], workers)) as collated:
            for item in collated:
                done += 1
                yield item
                if stream.tokens_per_microbatch != budget:
                    break  # what comes next is cut by the old budget: workers that know the new one begin again


def _collated_by_workers(stream: Stream, steps: Sequence[int], workers: int) -> Generator[tuple[int, MicroBatches]]:
    """What `prefetch` yields, by workers that keep the stream as it is now."""
    loader = DataLoader(
        _Shipments(stream),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=2,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        multiprocessing_context="fork",  # shares the data set; the workers touch no GPU
        generator=torch.Generator(),  # otherwise DataLoader would draw its seed from the global generator
    )
    iterator = iter(loader)
    try:
        for step in steps:
            try:
                shipment = next(iterator)
            except RuntimeError as error:
                if (death := worker_death(error)) is None:
                    raise
                raise RuntimeError(f"{death} [step {step}]") from error
            if isinstance(shipment, ValueError):
                raise shipment
            yield shipment.unload() if isinstance(shipment, _Shipment) else shipment
    finally:
        iterator._shutdown_workers()  # type: ignore[attr-defined]  # now, not when the last traceback lets go of it


def worker_death(error: RuntimeError) -> str | None:
    """What to say of an error by which torch tells, wherever the main process is, that a worker has died."""
    text = str(error).strip()
    if "DataLoader worker" not in text or "Caught" in text:
        return None
    if text.startswith("data.workers: "):
        return text
    if "signal" in str(error.__cause__):  # found dead after a handler of torch's had told of what
        text = str(error.__cause__)
    remedy = "start again, with fewer or none"
    if f"signal: {signal.strsignal(signal.SIGKILL)}" in text:  # which is how the kernel makes room
        remedy = "most often the machine is out of memory: lower data.workers"
    reason = text.splitlines()[0].rstrip(". ")
    return f"data.workers: a worker that collates batches died ({reason}); {remedy} (0 collates in the main process)"


@dataclass(frozen=True)
class _Shipment:
    """A step on its way out of a worker, its tensors as numpy arrays, which travel by value.

    Tensors would take a file descriptor each, ten a micro-batch, and a long run would exhaust them.
    """

    step: int
    microbatches: MicroBatches

    def unload(self) -> tuple[int, MicroBatches]:
        return self.step, _map_batches(self.microbatches, torch.from_numpy)

    def pin_memory(self) -> tuple[int, MicroBatches]:
        """Called by DataLoader's pinning thread."""
        step, microbatches = self.unload()
        return step, _pin(microbatches)


class _Shipments(Dataset[_Shipment | ValueError]):
    """What the workers run; a ValueError is the user's and crosses over as it is, without a worker's traceback."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, step: int) -> _Shipment | ValueError:
        try:
            return _Shipment(step, _map_batches(self.stream[step], lambda t: t.numpy()))
        except ValueError as error:
            return error


def _start_worker(worker_id: int) -> None:
    """Leave signals to the main process, which finishes its step and saves; a worker ends when told, or orphaned."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # each may be sent to the whole process group
        signal.signal(number, signal.SIG_IGN)


def _pin(microbatches: MicroBatches) -> MicroBatches:
    return replace(microbatches, batches=[batch.pin_memory() for batch in microbatches.batches])


def _map_batches(microbatches: MicroBatches, function: Callable[[Any], Any]) -> MicroBatches:
    return replace(microbatches, batches=[batch.map_tensors(function) for batch in microbatches.batches])
