"""Tokens a second beside a plain Hugging Face + PEFT loop of the same step, which pads: same model, rows and loss."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_train.config import BatchConfig, DataConfig, LoraConfig, ModelConfig, SFTConfig
from qwen_train.data.packing import pack_sequences
from qwen_train.data.stream import Stream
from qwen_train.model import load
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.model.packed import trainable_parameters

TINY = Path(__file__).parents[1] / "configs/tiny/model"
SEQUENCES, PADDED_BATCH, ROUNDS = 32, 8, 3


@pytest.fixture
def one_thread():
    """Processor time is then time spent computing, however busy the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wide_config() -> Any:
    """Wide enough that products, not calls, take the time."""
    config = AutoConfig.from_pretrained(TINY)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 1024, 3
    config.layer_types = ["full_attention"] * 3
    config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings = 4, 2, 1024
    return config


def make_rows(sigma: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and weights, the later half supervised; lengths lognormal with median 60, 8 to 480."""
    rng = np.random.default_rng(0)
    lengths = np.clip(60 * np.exp(sigma * rng.standard_normal(SEQUENCES)), 8, 480).astype(int)
    return [(rng.integers(0, 500, n), (np.arange(n) >= n // 2).astype(np.float32)) for n in lengths]


class Ours:
    """The product's step: stream, packed micro-batches, chunked head."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list) -> None:
        config = SFTConfig(
            model=ModelConfig(path=str(TINY), from_scratch=True, dtype="float32", compile=False, checkpoint_layers=0),
            data=DataConfig(train="x", max_length=512, shuffle=False),
            batch=BatchConfig(sequences_per_step=len(rows)),
            lora=LoraConfig(r=8),
        )
        with monkeypatch.context() as patch:
            patch.setattr(load, "load_model_config", lambda _: wide_config())
            self.model = load_model(
                config,
                load_tokenizer(ModelConfig(path=str(TINY))),
                torch.device("cpu"),
                Path("/nonexistent"),
                is_main=False,
            )
        self.stream = Stream(
            config,
            lengths=np.array([len(ids) for ids, _ in rows]),
            total_weights=np.array([weights[1:].sum() for _, weights in rows]),
            collate=lambda members: pack_sequences([rows[member] for member in members], members),
            tokens_per_microbatch=2048,
            sources=np.zeros(len(rows), dtype=np.int32),
            source_weights=[1.0],
        )
        self.optimizer = torch.optim.AdamW(trainable_parameters(self.model).values(), lr=1e-3)

    def step(self) -> float:
        total = 0.0
        microbatches = self.stream[0]
        for batch in microbatches.batches:
            loss = -(self.model(batch).logps * batch.weights).sum() / microbatches.total_weight
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class Plain:
    """Hugging Face and PEFT as their documentation has it: batches in the order of the rows, padded to the longest."""

    def __init__(self, rows: list, ours: Ours) -> None:
        lm = AutoModelForCausalLM.from_config(wide_config(), attn_implementation="sdpa")
        lora = PeftLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(lm, lora)
        self.model.load_state_dict({name.replace("lm.", "", 1): t for name, t in ours.model.state_dict().items()})
        self.batches = [self.padded(rows[start : start + PADDED_BATCH]) for start in range(0, len(rows), PADDED_BATCH)]
        self.total = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in self.batches)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)

    @staticmethod
    def padded(rows: list) -> dict[str, Tensor]:
        width = max(len(ids) for ids, _ in rows)
        batch = {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        batch["labels"] = torch.full((len(rows), width), -100)
        for index, (ids, weights) in enumerate(rows):
            batch["input_ids"][index, : len(ids)] = torch.from_numpy(ids)
            batch["attention_mask"][index, : len(ids)] = 1
            batch["labels"][index, : len(ids)] = torch.from_numpy(np.where(weights > 0, ids, -100))
        return batch

    def step(self) -> float:
        total = 0.0
        for batch in self.batches:
            loss = self.model(**batch, num_items_in_batch=self.total, use_cache=False).loss
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def speed_ratio(monkeypatch: pytest.MonkeyPatch, sigma: float, rounds: int) -> float:
    """Plain's time over ours for the same steps, taken in turns; the least of each."""
    rows = make_rows(sigma)
    ours = Ours(monkeypatch, rows)
    plain = Plain(rows, ours)
    times: dict[Any, list[float]] = {ours: [], plain: []}
    losses: dict[Any, list[float]] = {ours: [], plain: []}
    for _ in range(rounds):
        for loop in (ours, plain):
            begin = time.process_time()
            losses[loop].append(loop.step())
            times[loop].append(time.process_time() - begin)
    assert losses[ours] == pytest.approx(losses[plain], abs=1e-5), "the same model, rows, loss and updates"
    assert losses[ours][0] - losses[ours][-1] > 1e-3, "it trains"
    return min(times[plain]) / min(times[ours])


def test_twice_a_padded_loop(monkeypatch: pytest.MonkeyPatch, one_thread: None):
    ratio = speed_ratio(monkeypatch, sigma=0.9, rounds=ROUNDS)
    assert ratio >= 2, ratio


def test_no_such_ratio_without_padding(monkeypatch: pytest.MonkeyPatch, one_thread: None):
    """Control: with rows of one length a padded loop loses nothing, and the clock shows it."""
    ratio = speed_ratio(monkeypatch, sigma=0.0, rounds=2)
    assert 0.6 < ratio < 2, ratio
