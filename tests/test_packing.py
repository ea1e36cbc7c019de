"""The collators, against tensors worked out by hand."""

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_train.data.packing import TENSOR_FIELDS, Batch, empty_batch, pack_pairs, pack_sequences

# Two pairs: prompt of 3, chosen of 2, rejected of 3; prompt of 1, chosen of 1, rejected of 2.
PAIRS = [
    (np.array([1, 2, 3]), np.array([10, 11]), np.array([20, 21, 22])),
    (np.array([30]), np.array([40]), np.array([50, 51])),
]


def assert_fields(batch: Batch, expected: dict[str, list[int] | list[float] | None]) -> None:
    dtypes = {"weights": torch.float32, "cu_seqlens_q": torch.int32, "cu_seqlens_k": torch.int32}
    for name, values in expected.items():
        tensor = getattr(batch, name)
        if values is None:
            assert tensor is None, name
        else:
            assert tensor.dtype == dtypes.get(name, torch.int64), name
            assert tensor.tolist() == values, name
    assert expected.keys() == set(TENSOR_FIELDS)


def test_sequences_by_hand():
    sequences = [
        (np.array([5, 6, 7, 8], dtype=np.int32), np.array([0, 0, 1, 0.5], dtype=np.float32)),
        (np.array([9], dtype=np.int32), np.array([0], dtype=np.float32)),
        (np.array([3, 4, 2], dtype=np.int32), np.array([0, 1, 0], dtype=np.float32)),
    ]
    batch = pack_sequences(sequences, rows=[12, 3, 7])
    assert_fields(
        batch,
        {
            "input_ids": [5, 6, 7, 8, 9, 3, 4, 2],
            "position_ids": [0, 1, 2, 3, 0, 0, 1, 2],
            "cu_seqlens_q": [0, 4, 5, 8],
            "cu_seqlens_k": [0, 4, 5, 8],
            "kv_index": None,
            "target_positions": [1, 2, 5],  # 6 predicts 7, 7 predicts 8, 3 predicts 4; zero weights are left out
            "targets": [7, 8, 4],
            "weights": [1.0, 0.5, 1.0],
            "sequence_ids": [0, 0, 2],
        },
    )
    assert (batch.max_q, batch.max_k, batch.num_sequences, batch.num_tokens) == (4, 4, 3, 8)
    assert batch.rows == (12, 3, 7)
    assert all(type(number) is int for number in (batch.max_q, batch.max_k, batch.num_sequences, *batch.rows))


def test_pairs_with_shared_prompt_by_hand():
    batch = pack_pairs(PAIRS, rows=[7, 8], share_prompt=True)
    assert_fields(
        batch,
        {
            "input_ids": [1, 2, 3, 10, 11, 20, 21, 22, 30, 40, 50, 51],
            "position_ids": [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 2],
            "cu_seqlens_q": [0, 5, 8, 10, 12],
            "cu_seqlens_k": [0, 5, 11, 13, 16],
            "kv_index": [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 8, 10, 11],
            "target_positions": [2, 3, 2, 5, 6, 8, 8, 10],  # 2 and 8, the prompts' ends, serve both answers
            "targets": [10, 11, 20, 21, 22, 40, 50, 51],
            "weights": [1.0] * 8,
            "sequence_ids": [0, 0, 1, 1, 1, 2, 3, 3],
        },
    )
    assert (batch.max_q, batch.max_k, batch.num_sequences, batch.num_tokens, batch.rows) == (5, 6, 4, 12, (7, 8))


def test_pairs_without_sharing_by_hand():
    batch = pack_pairs(PAIRS, rows=[7, 8], share_prompt=False)
    assert_fields(
        batch,
        {
            "input_ids": [1, 2, 3, 10, 11, 1, 2, 3, 20, 21, 22, 30, 40, 30, 50, 51],
            "position_ids": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2],
            "cu_seqlens_q": [0, 5, 11, 13, 16],
            "cu_seqlens_k": [0, 5, 11, 13, 16],
            "kv_index": None,
            "target_positions": [2, 3, 7, 8, 9, 11, 13, 14],
            "targets": [10, 11, 20, 21, 22, 40, 50, 51],
            "weights": [1.0] * 8,
            "sequence_ids": [0, 0, 1, 1, 1, 2, 3, 3],
        },
    )
    assert (batch.max_q, batch.max_k, batch.num_sequences, batch.num_tokens, batch.rows) == (6, 6, 4, 16, (7, 8))


def random_pairs(seed: int, count: int = 9) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(1, 1000, rng.integers(1, 12)).astype(np.int32) for _ in range(3)) for _ in range(count)]


def contexts(batch: Batch) -> list[tuple[list[int], list[int], int]]:
    """Ids and positions that each supervised token is predicted from, and the token, by reading the segments back."""
    kv_index = torch.arange(batch.num_tokens) if batch.kv_index is None else batch.kv_index
    queries, keys = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
    result = []
    for position, target, sequence in zip(
        batch.target_positions.tolist(), batch.targets.tolist(), batch.sequence_ids.tolist(), strict=True
    ):
        segment = next(i for i in range(len(queries) - 1) if queries[i] <= position < queries[i + 1])
        last = keys[segment + 1] - (queries[segment + 1] - position)  # aligned bottom-right
        seen = kv_index[keys[segment] : last + 1]
        result.append((batch.input_ids[seen].tolist(), batch.position_ids[seen].tolist(), target, sequence))
    return result


@pytest.mark.parametrize("seed", range(5))
def test_shared_and_unshared_layout_predict_the_same_tokens_from_the_same_context(seed):
    pairs = random_pairs(seed)
    shared, unshared = (pack_pairs(pairs, range(len(pairs)), share_prompt=share) for share in (True, False))
    expected = [
        ([*prompt, *answer[:i]], list(range(len(prompt) + i)), answer[i], 2 * pair + which)
        for pair, (prompt, *answers) in enumerate(pairs)
        for which, answer in enumerate(answers)
        for i in range(len(answer))
    ]
    assert contexts(shared) == expected
    assert contexts(unshared) == expected
    assert shared.num_tokens == unshared.num_tokens - sum(len(prompt) for prompt, _, _ in pairs)
    # Negative controls: the plain row as keys, and positions that run on, are seen by this reading.
    wrong_keys = torch.arange(len(shared.kv_index)).clamp(max=shared.num_tokens - 1)
    assert contexts(changed(shared, kv_index=wrong_keys)) != expected
    assert contexts(changed(shared, position_ids=torch.arange(shared.num_tokens))) != expected


def changed(batch: Batch, **fields: Tensor) -> Batch:
    return Batch(**{**vars(batch), **fields})


def test_the_empty_batch_is_one_unsupervised_token():
    for batch in (empty_batch(), pack_sequences([], []), pack_pairs([], [], True), pack_pairs([], [], False)):
        assert (batch.num_tokens, batch.num_sequences, batch.rows, batch.max_q, batch.max_k) == (1, 0, (), 1, 1)
        assert batch.cu_seqlens_q.tolist() == batch.cu_seqlens_k.tolist() == [0, 1]
        assert [len(t) for t in (batch.target_positions, batch.targets, batch.weights, batch.sequence_ids)] == [0] * 4
        assert batch.weights.dtype == torch.float32
    assert pack_pairs([], [], True).kv_index.tolist() == [0]  # the same graph as a full shared batch
    assert pack_pairs([], [], False).kv_index is None


def test_a_sequence_whose_first_token_is_supervised_is_refused():
    with pytest.raises(AssertionError, match="first token"):
        pack_sequences([(np.array([1, 2]), np.array([0, 1.0])), (np.array([3, 4]), np.array([1.0, 1.0]))], [0, 1])


@pytest.mark.parametrize("share", [True, False])
def test_pairs_with_an_empty_part_are_refused(share):
    with pytest.raises(AssertionError, match="each hold a token"):
        pack_pairs([(np.array([1]), np.array([], dtype=np.int64), np.array([2]))], [0], share_prompt=share)


def test_moving_keeps_every_field():
    batch = pack_pairs(PAIRS, rows=[7, 8], share_prompt=True)
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in TENSOR_FIELDS)
    assert (moved.max_q, moved.rows, moved.num_sequences, moved.num_tokens) == (5, (7, 8), 4, 12)
    plain = pack_pairs(PAIRS, rows=[7, 8], share_prompt=False).to("cpu", non_blocking=True)
    assert plain.kv_index is None and plain.num_tokens == 16


def test_packing_64_sequences_of_1000_tokens_takes_under_5_ms():
    rng = np.random.default_rng(0)
    weights = np.r_[0, np.ones(999)].astype(np.float32)
    sequences = [(rng.integers(0, 150_000, 1000).astype(np.int32), weights) for _ in range(64)]
    pairs = [(ids[:600], ids[600:800], ids[800:]) for ids, _ in sequences]
    for pack in (lambda: pack_sequences(sequences, range(64)), lambda: pack_pairs(pairs, range(64), True)):
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            pack()
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 5e-3  # 0.5 ms on a quiet core
