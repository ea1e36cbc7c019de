"""The collators: sequences or preference pairs -> Batch, the one batch type of the project. There is no padded path.

Shape letters: T packed tokens, S supervised tokens, N attention segments, K gathered keys, L tokens of one sequence.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IntArray = np.ndarray[Any, np.dtype[np.integer]]
FloatArray = np.ndarray[Any, np.dtype[np.floating]]

TENSOR_FIELDS = (
    "input_ids",
    "position_ids",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "kv_index",
    "target_positions",
    "targets",
    "weights",
    "sequence_ids",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Sequences laid end to end without padding, and the list of tokens that are supervised."""

    input_ids: Tensor
    """Token ids of the packed row. Shape [T], int64."""

    position_ids: Tensor
    """Position of each token in its own sequence; restarts at each sequence. Shape [T], int64."""

    cu_seqlens_q: Tensor
    """Where each attention segment's queries begin in the packed row, then T. Shape [N + 1], int32."""

    cu_seqlens_k: Tensor
    """Where each attention segment's keys begin in the gathered keys, then K. Shape [N + 1], int32."""

    max_q: int
    """Queries of the longest segment."""

    max_k: int
    """Keys of the longest segment."""

    kv_index: Tensor | None
    """Packed position of each key, so that one prompt serves two answers; None: keys are the row itself. [K], int64."""

    target_positions: Tensor
    """Packed position whose hidden state predicts each supervised token; one may serve two tokens. [S], int64."""

    targets: Tensor
    """Id of each supervised token. Shape [S], int64."""

    weights: Tensor
    """Weight of each supervised token, never 0. Shape [S], float32."""

    sequence_ids: Tensor
    """Sequence each supervised token belongs to, 0 .. num_sequences - 1, ascending. Shape [S], int64."""

    num_sequences: int
    """Sequences in the row: conversations, or two a pair (2i is chosen, 2i + 1 rejected); fill is not counted."""

    rows: tuple[int, ...]
    """Data set row of each conversation or pair, in packed order."""

    @property
    def num_tokens(self) -> int:
        """Length T of the packed row, fill included."""
        return self.input_ids.shape[0]

    @property
    def mean_length(self) -> float:
        """Length of the sequence in which a mean token stands; a shared prompt belongs to both of its sequences."""
        queries, keys = self.cu_seqlens_q.diff().double(), self.cu_seqlens_k.diff().double()
        return float((keys**2 - (keys - queries) ** 2).sum() / queries.sum())

    def sequence_sums(self, values: Tensor) -> Tensor:
        """``values`` [S] of the supervised tokens summed over each sequence: float64 [N], differentiable."""
        sums = values.new_zeros(self.num_sequences, dtype=torch.float64)
        return sums.index_add(0, self.sequence_ids, values.double())

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply ``function`` to every tensor and keep the rest."""
        tensors = {name: getattr(self, name) for name in TENSOR_FIELDS}
        mapped: dict[str, Any] = {name: None if t is None else function(t) for name, t in tensors.items()}
        return replace(self, **mapped)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy to ``device``; with ``non_blocking`` and pinned memory the host does not wait."""
        return self.map_tensors(lambda t: t.to(device, non_blocking=non_blocking))

    def bounded(self, max_length: int) -> "Batch":
        """The same with `max_q` and `max_k` raised to at least ``max_length``.

        The kernels want an upper bound only, and a number that differs in every batch would make torch.compile compile
        its layers again.
        """
        return replace(self, max_q=max(self.max_q, max_length), max_k=max(self.max_k, max_length))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which copies to the GPU overlap with compute."""
        return self.map_tensors(lambda t: t.pin_memory())


def pack_sequences(sequences: Sequence[tuple[IntArray, FloatArray]], rows: Sequence[int]) -> Batch:
    """Lay sequences end to end; the hidden state before a token predicts it.

    A sequence is (input_ids [L], weights [L]): ``weights[i]`` weighs the prediction of token i, so ``weights[0]`` is 0.
    No sequences at all give the empty batch.
    """
    assert len(sequences) == len(rows), "one row a sequence"
    if not sequences:
        return empty_batch()
    lengths = np.array([len(ids) for ids, _ in sequences])
    assert lengths.min() > 0, "a sequence without tokens"
    ids = np.concatenate([ids for ids, _ in sequences]).astype(np.int64)
    weights = np.concatenate([weights for _, weights in sequences]).astype(np.float32)
    assert len(weights) == len(ids), "one weight a token"
    starts = _offsets(lengths)[:-1]
    assert not weights[starts].any(), "nothing predicts the first token of a sequence: its weight must be 0"
    supervised = np.flatnonzero(weights)
    return _batch(
        input_ids=ids,
        position_ids=np.arange(len(ids)) - np.repeat(starts, lengths),
        lengths_q=lengths,
        lengths_k=lengths,
        kv_index=None,
        target_positions=supervised - 1,
        targets=ids[supervised],
        weights=weights[supervised],
        sequence_ids=np.repeat(np.arange(len(lengths)), lengths)[supervised],
        num_sequences=len(sequences),
        rows=rows,
    )


def pack_pairs(pairs: Sequence[tuple[IntArray, IntArray, IntArray]], rows: Sequence[int], share_prompt: bool) -> Batch:
    """Lay preference pairs (prompt_ids, chosen_ids, rejected_ids) end to end; every answer token has weight 1.

    ``share_prompt``: a pair is ``[prompt | chosen | rejected]`` with two attention segments, queries prompt + chosen
    over keys prompt + chosen, and queries rejected over keys prompt + rejected, gathered by ``kv_index``; positions of
    rejected restart after the prompt, and the prompt's last token predicts the first token of both answers. Otherwise
    ``[prompt | chosen]`` and ``[prompt | rejected]`` follow each other as plain sequences. Both list the supervised
    tokens in the same order.
    """
    assert len(pairs) == len(rows), "one row a pair"
    if not pairs:
        return replace(empty_batch(), kv_index=torch.zeros(1, dtype=torch.int64)) if share_prompt else empty_batch()
    if not share_prompt:
        sequences = [supervised_answer(prompt, answer) for prompt, *answers in pairs for answer in answers]
        return replace(pack_sequences(sequences, range(len(sequences))), rows=tuple(int(row) for row in rows))
    parts = np.array([[len(part) for part in pair] for pair in pairs])  # [P, 3]
    assert parts.min() > 0, "prompt, chosen and rejected must each hold a token"
    prompt, chosen, rejected = parts.T
    starts = _offsets(parts.sum(axis=1))[:-1]  # of each pair in the packed row
    ids = np.concatenate([part for pair in pairs for part in pair]).astype(np.int64)

    # Everything below is a run of consecutive numbers for each answer or segment, in the order chosen, rejected.
    zeros = np.zeros_like(prompt)
    answers = _interleave(chosen, rejected)
    answer_starts = _interleave(starts + prompt, starts + prompt + chosen)
    answer_tokens = _ranges(answer_starts, answers)
    # A token is predicted one position earlier, but the first token of rejected by the end of the prompt.
    target_positions = answer_tokens - 1
    first_of_rejected = _offsets(answers)[1:-1:2]
    target_positions[first_of_rejected] = starts + prompt - 1
    return _batch(
        input_ids=ids,
        position_ids=_ranges(_interleave(zeros, prompt), _interleave(prompt + chosen, rejected)),
        lengths_q=_interleave(prompt + chosen, rejected),
        lengths_k=_interleave(prompt + chosen, prompt + rejected),
        kv_index=_ranges(
            _interleave(starts, starts, starts + prompt + chosen), _interleave(prompt + chosen, prompt, rejected)
        ),
        target_positions=target_positions,
        targets=ids[answer_tokens],
        weights=np.ones(len(answer_tokens), dtype=np.float32),
        sequence_ids=np.repeat(np.arange(len(answers)), answers),
        num_sequences=len(answers),
        rows=rows,
    )


def empty_batch() -> Batch:
    """One dummy token that supervises nothing: a rank without work still takes part in every collective."""
    none = np.empty(0, dtype=np.int64)
    return _batch(
        input_ids=np.zeros(1, dtype=np.int64),
        position_ids=np.zeros(1, dtype=np.int64),
        lengths_q=np.ones(1, dtype=np.int64),
        lengths_k=np.ones(1, dtype=np.int64),
        kv_index=None,
        target_positions=none,
        targets=none,
        weights=none,
        sequence_ids=none,
        num_sequences=0,
        rows=(),
    )


def _batch(
    *,
    lengths_q: IntArray,
    lengths_k: IntArray,
    num_sequences: int,
    rows: Sequence[int],
    weights: np.ndarray,
    kv_index: IntArray | None,
    **indices: IntArray,
) -> Batch:
    """Turn numpy arrays and segment lengths into a Batch."""
    return Batch(
        cu_seqlens_q=torch.from_numpy(_offsets(lengths_q).astype(np.int32)),
        cu_seqlens_k=torch.from_numpy(_offsets(lengths_k).astype(np.int32)),
        max_q=int(lengths_q.max()),
        max_k=int(lengths_k.max()),
        kv_index=None if kv_index is None else torch.from_numpy(kv_index.astype(np.int64, copy=False)),
        weights=torch.from_numpy(weights.astype(np.float32, copy=False)),
        num_sequences=num_sequences,
        rows=tuple(int(row) for row in rows),
        **{name: torch.from_numpy(array.astype(np.int64, copy=False)) for name, array in indices.items()},
    )


def supervised_answer(
    prompt: IntArray | Sequence[int], answer: IntArray | Sequence[int]
) -> tuple[IntArray, FloatArray]:
    """A prompt and its answer as one sequence, for `pack_sequences`, of which the answer is supervised."""
    assert len(prompt) > 0 and len(answer) > 0, "prompt, chosen and rejected must each hold a token"
    length = len(prompt) + len(answer)
    return np.concatenate([prompt, answer]), token_weights(length, [(len(prompt), length, 1.0)])


def token_weights(length: int, spans: Iterable[tuple[int, int, float]]) -> FloatArray:
    """Weight of each of ``length`` tokens, given those that are supervised as (start, end, weight). [L], float32."""
    weights = np.zeros(length, dtype=np.float32)
    for start, end, weight in spans:
        weights[start:end] = weight
    return weights


def _offsets(lengths: IntArray) -> IntArray:
    """Where each stretch begins, then the total. Shape [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _interleave(*columns: IntArray) -> IntArray:
    """The columns' first values, then their second values, and so on."""
    return np.stack(columns, axis=1).ravel()


def _ranges(firsts: IntArray, lengths: IntArray) -> IntArray:
    """``arange(first, first + length)`` of every stretch, end to end."""
    offsets = _offsets(lengths)
    return np.arange(offsets[-1]) + np.repeat(firsts - offsets[:-1], lengths)
