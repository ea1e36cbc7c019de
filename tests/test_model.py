"""The model as a whole, in fp32: the loop against plain transformers, recomputation, adapters, samples, folders."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qwen_train import sft
from qwen_train.command_line import load_config
from qwen_train.config import ModelConfig, SFTConfig
from qwen_train.data.packing import Batch, empty_batch, pack_sequences
from qwen_train.model.load import load_model, load_model_config, load_tokenizer, special_tokens
from qwen_train.model.memory import WHOLE, estimate_memory, with_candidate
from qwen_train.model.packed import PackedLM, num_adapter_parameters, trainable_parameters
from qwen_train.model.weights import _write_base
from qwen_train.output.merge import load_plainly
from qwen_train.train.distributed import Run
from qwen_train.train.script import _explained
from qwen_train.train.splits import load_split
from tests.preferences import edit_json
from tests.scripts import TINY, read_metrics
from tests.support import mini_tokenizer

TOLERANCE = 1e-5  # relative to the largest value
ROWS, LONGEST = 24, 60  # no two rows fit into LONGEST tokens
TINY_CONFIG = json.loads((TINY / "model/config.json").read_text())

pytestmark = pytest.mark.usefixtures("own_signals")
ON_A_GPU = [pytest.param("cuda", compiled, marks=pytest.mark.gpu) for compiled in (False, True)]


@dataclass
class Trained:
    """What a run in this process left: its folder, its model, the gradients of each step before clipping."""

    folder: Path
    model: PackedLM
    gradients: list[dict[str, Tensor]]

    @property
    def log(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)


class World:
    """Runs of the embedded default, cut to 24 rows."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder, self.cache_dir, self.count = folder, cache_dir, 0
        tokenizer = AutoTokenizer.from_pretrained(TINY / "model")

        def length(row: str) -> int:
            return len(tokenizer.apply_chat_template(json.loads(row)["messages"], return_dict=True)["input_ids"])

        rows = (TINY / "sft_train.jsonl").read_text().splitlines()[:1000]
        alike = [row for row in rows if LONGEST / 2 < length(row) <= LONGEST][:ROWS]
        assert len(alike) == ROWS
        (folder / "rows.jsonl").write_text("\n".join(alike) + "\n")

    def config(self, *arguments: str) -> SFTConfig:
        given = {
            "model.path": TINY / "model",
            "run.dir": self.folder,
            "data.train": self.folder / "rows.jsonl",
            "data.eval": "null",
            "data.cache_dir": self.cache_dir,
            "data.max_length": 128,
            "batch.sequences_per_step": 8,
            "batch.tokens_per_microbatch": 4096,
            "run.steps": 4,
            "run.log_every": 1,
            "run.save_every": 0,
            "lora.r": 4,
        }
        words = [word.removeprefix("--") for word in arguments]
        overridden = {word.split("=")[0] for word in words}
        if "lora.enabled=false" in words or "model.adapter_start=continue" in words:
            overridden.add("lora.r")
        argv = [f"--{name}={value}" for name, value in given.items() if name not in overridden]
        return load_config(SFTConfig, [*argv, *(f"--{word}" for word in words)])[0]

    def load(self, *arguments: str, device: str = "cpu") -> PackedLM:
        config = with_candidate(self.config(*arguments), recomputed=0, tokens=4096)
        return load_model(config, load_tokenizer(config.model), torch.device(device), self.folder / "none", False)

    def train(self, *arguments: str) -> Trained:
        self.count += 1
        config = self.config(f"run.name=run-{self.count}", *arguments)
        gradients: list[dict[str, Tensor]] = []
        models: list[PackedLM] = []
        clip, write = Run.clip_grad_norm, sft.write_result

        def clipping(run: Run, model: PackedLM, max_norm: float) -> float:
            named = trainable_parameters(model).items()
            gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
            return clip(run, model, max_norm)

        def writing(run: Run, folder: Any, model: PackedLM, *others: Any, **named: Any) -> None:
            models.append(model)
            write(run, folder, model, *others, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "clip_grad_norm", clipping)
            patch.setattr(sft, "write_result", writing)
            sft.train(config, Run(config.run.seed, config.run.deterministic))
        return Trained(self.folder / f"run-{self.count}", models[0], gradients)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, own_signals: None) -> World:
    return World(tmp_path_factory.mktemp("model"), cache_dir)


@pytest.fixture(scope="module")
def start(world: World) -> Trained:
    """A LoRA run: its base, its adapter, its model as it was at the end of training."""
    return world.train("run.steps=12")


@pytest.fixture(scope="module")
def on_start(start: Trained) -> tuple[str, ...]:
    return f"model.path={start.folder / 'base'}", "model.from_scratch=false"


def difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30))


# --- the loop against plain transformers ------------------------------------------------------------------------------


def plain_rows(tokenizer: Any, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """ids[1, L] and labels[1, L] by transformers' own template; the mask by looking for role headers in the ids."""
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for line in path.read_text().splitlines():
        ids = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)["input_ids"]
        labels = [-100] * len(ids)
        for position in range(len(ids) - len(header)):
            if ids[position : position + len(header)] == header:
                first = position + len(header)
                last = ids.index(end, first)
                labels[first : last + 1] = ids[first : last + 1]
        yield torch.tensor([ids]), torch.tensor([labels])


def plain_gradients(lm: nn.Module, rows: list[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one sequence at a time, unpadded, summed over tokens and divided by all of them."""
    total = sum(int((labels != -100).sum()) for _, labels in rows)
    loss = 0.0
    for ids, labels in rows:
        logits = lm(input_ids=ids).logits[0, :-1]
        nll = F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum") / total
        nll.backward()
        loss += nll.item()
    return loss, {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}


WHOLE_DATA = (f"batch.sequences_per_step={ROWS}", "batch.tokens_per_microbatch=300", "run.steps=1")


def test_first_gradients_of_full_training(world: World, start: Trained, on_start: tuple[str, ...]):
    trained = world.train("lora.enabled=false", *WHOLE_DATA, *on_start)
    tokenizer = AutoTokenizer.from_pretrained(start.folder / "base")
    rows = list(plain_rows(tokenizer, world.folder / "rows.jsonl"))
    lm = AutoModelForCausalLM.from_pretrained(start.folder / "base", dtype=torch.float32)
    loss, gradients = plain_gradients(lm, rows)
    assert trained.log[0]["train/loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert trained.gradients[0].keys() == gradients.keys()
    largest = max(difference(trained.gradients[0][name], gradients[name]) for name in gradients)
    assert largest <= TOLERANCE
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert trained.log[0]["train/grad_norm"] == pytest.approx(float(norm), rel=TOLERANCE)

    # The negative control: the mask of one more token is seen.
    rows[0][1][0, -2] = rows[0][0][0, -2] if rows[0][1][0, -2] == -100 else -100
    lm.zero_grad()
    assert difference(trained.gradients[0][name := "model.norm.weight"], plain_gradients(lm, rows)[1][name]) > TOLERANCE


def test_first_gradients_of_an_adapter(world: World, start: Trained, on_start: tuple[str, ...]):
    adapter = start.folder / "adapter"
    trained = world.train(f"model.adapter={adapter}", "model.adapter_start=continue", *WHOLE_DATA, *on_start)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(start.folder / "base", dtype=torch.float32)
    lm = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    loss, gradients = plain_gradients(lm, list(plain_rows(tokenizer, world.folder / "rows.jsonl")))
    assert trained.log[0]["train/loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert trained.gradients[0].keys() == {name.replace(".default.", ".") for name in gradients}
    for name, gradient in gradients.items():
        assert difference(trained.gradients[0][name.replace(".default.", ".")], gradient) <= TOLERANCE, name


# --- how a step is cut up and computed does not matter ----------------------------------------------------------------


def same_course(one: Trained, other: Trained, tolerance: float) -> None:
    assert len(one.log) == len(other.log)
    for a, b in zip(one.log, other.log, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=tolerance), (a["step"], name)


def test_accumulation_1x8_is_8x1(world: World, monkeypatch: pytest.MonkeyPatch):
    """20 steps of one micro-batch of eight sequences, and of eight micro-batches of one."""
    counts: list[int] = []
    accumulate = Run.accumulate

    def counting(run: Run, microbatches: Any, step: int) -> Iterator[Batch]:
        counts.append(len(microbatches.batches))
        return accumulate(run, microbatches, step)

    monkeypatch.setattr(Run, "accumulate", counting)
    whole = world.train("run.steps=20")
    pieces = world.train("run.steps=20", f"data.max_length={LONGEST}", f"batch.tokens_per_microbatch={LONGEST}")
    assert counts == [1] * 20 + [8] * 20
    same_course(whole, pieces, TOLERANCE)
    with pytest.raises(AssertionError):  # the negative control: seven sequences a step are another course
        same_course(whole, world.train("run.steps=20", "batch.sequences_per_step=7"), TOLERANCE)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputed_layers_change_nothing(world: World, dropout: float):
    kept = world.train(f"lora.dropout={dropout}")
    recomputed = world.train(f"lora.dropout={dropout}", "model.checkpoint_layers=2")
    assert kept.log == recomputed.log
    for name, gradient in kept.gradients[-1].items():
        assert torch.equal(gradient, recomputed.gradients[-1][name]), name


@pytest.fixture(scope="module")
def masked_attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with dropout in its attention."""
    folder = shutil.copytree(TINY / "model", tmp_path_factory.mktemp("masked") / "model")
    edit_json(folder / "config.json", attention_dropout=0.2)
    return folder


@pytest.mark.parametrize("arguments", [(), ("lora.enabled=false",)], ids=["lora", "full"])
def test_recomputed_attention_drops_out_the_same(world: World, masked_attention: Path, arguments: tuple[str, ...]):
    path, norms = f"model.path={masked_attention}", []
    for layers in (0, LAYERS):
        trained = world.train(path, "run.steps=1", f"model.checkpoint_layers={layers}", *arguments)
        norms.append(trained.log[0]["train/grad_norm"])
    assert norms[0] == norms[1]
    assert norms[0] != world.train("run.steps=1", *arguments).log[0]["train/grad_norm"], "there are masks"


def test_recomputed_layers_of_a_continued_adapter(world: World, on_start: tuple[str, ...]):
    """Its dropout is its own; the config has none until `resolve_start` reads it."""
    adapter = world.train("lora.dropout=0.3", "run.steps=1", *on_start).folder / "adapter"
    continued = [f"model.adapter={adapter}", "model.adapter_start=continue", *on_start]
    model, batch = world.load(*continued), packed(sequence(20, 1), sequence(40, 2))
    gradients = []
    for layers in (0, LAYERS):
        model.layers.recompute(layers)
        torch.manual_seed(0)
        model.zero_grad()
        model(batch).logps.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in trainable_parameters(model).items()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize(("device", "compiled"), [("cpu", False), *ON_A_GPU])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputed_layers_in_bfloat16(world: World, device: str, compiled: bool, dropout: float):
    """On a GPU the attention's backward adds in any order: equal but for that, and far from other masks."""
    settings = ("model.dtype=bfloat16", f"model.compile={compiled}", f"lora.dropout={dropout}")
    model = world.load("model.from_scratch=true", *settings, device=device)
    batch = packed(sequence(20, 1), sequence(40, 2), sequence(90, 3)).to(torch.device(device))
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)

    def gradients(layers: int, seed: int) -> Tensor:
        model.layers.recompute(layers)
        torch.manual_seed(seed)
        model.zero_grad()
        model(batch).logps.sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in trainable_parameters(model).values()])

    kept = gradients(0, seed=0)
    assert (gradients(LAYERS, seed=0) - kept).norm() <= (1e-2 if device == "cuda" else 0.0) * kept.norm()
    assert model.layers.fallback.reason is None
    if dropout:
        assert (gradients(LAYERS, seed=1) - kept).norm() > 0.1 * kept.norm()


def test_recomputation_with_other_masks_would_show(world: World, monkeypatch: pytest.MonkeyPatch):
    """The negative control: without the generator's state backward sees other dropout masks than forward did."""
    from qwen_train.model import packed as module

    layers = module.DecoderLayers
    kept = world.train("lora.dropout=0.1")
    monkeypatch.setattr(module, "DecoderLayers", lambda modules, compiled, dropout: layers(modules, compiled, False))
    wrong = world.train("lora.dropout=0.1", "model.checkpoint_layers=3")
    assert kept.log[0]["train/loss"] == wrong.log[0]["train/loss"]
    assert kept.log[0]["train/grad_norm"] != wrong.log[0]["train/grad_norm"]


# --- one batch --------------------------------------------------------------------------------------------------------


def sequence(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    weights = np.ones(length, dtype=np.float32)
    weights[: length // 2] = 0
    return generator.integers(0, TINY_CONFIG["vocab_size"] - 10, length), weights


def packed(*sequences: tuple[np.ndarray, np.ndarray]) -> Batch:
    return pack_sequences(list(sequences), list(range(len(sequences))))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_sequence_does_not_see_its_neighbours(start: Trained, mode: str):
    """Perturbing sequence A leaves the log-probabilities of B and C unchanged to the last bit."""
    model = start.model.train(mode == "train")
    a, b, c = sequence(20, 1), sequence(33, 2), sequence(7, 3)
    other = (np.flip(a[0]).copy(), a[1])
    with torch.no_grad():
        before, after = model(packed(b, a, c)), model(packed(b, other, c))
        owner = packed(b, a, c).sequence_ids
        for index in (0, 2):
            assert torch.equal(before.logps[owner == index], after.logps[owner == index])
        assert not torch.equal(before.logps[owner == 1], after.logps[owner == 1])

        # The negative control: all three as one segment, and the ones behind A change.
        def merged(batch: Batch) -> Batch:
            ends = torch.tensor([0, batch.num_tokens], dtype=torch.int32)
            return replace(batch, cu_seqlens_q=ends, cu_seqlens_k=ends, max_q=batch.num_tokens, max_k=batch.num_tokens)

        before, after = model(merged(packed(b, a, c))), model(merged(packed(b, other, c)))
        assert not torch.equal(before.logps[owner == 2], after.logps[owner == 2])


@pytest.mark.parametrize("arguments", [(), ("lora.enabled=false",), ("lora.dropout=0.1",), ("lora.use_dora=true",)])
def test_nothing_supervised_gives_zero_gradients(world: World, arguments: tuple[str, ...]):
    """Loss 0 and a zero gradient, not None, for every trained parameter: ranks would wait for each other otherwise."""
    for nothing in (empty_batch(), packed((sequence(9, 1)[0], np.zeros(9, dtype=np.float32)))):
        model = world.load(*arguments)
        scores = model(nothing)
        loss = -(scores.logps * nothing.weights).sum() / 5
        loss.backward()
        assert loss.item() == 0 and len(scores.logps) == 0
        for name, parameter in trainable_parameters(model).items():
            assert parameter.grad is not None and not parameter.grad.any(), name


# --- adapters and families --------------------------------------------------------------------------------------------


def plain_logps(lm: Any, sequences: list[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """Log-probabilities of the supervised tokens by a plain forward of one sequence at a time."""
    values = []
    for ids, weights in sequences:
        logits = lm(input_ids=torch.tensor(ids)[None]).logits[0].double()
        logps = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        values.append(logps[torch.tensor(weights[1:]) > 0])
    return torch.cat(values)


LAYERS = TINY_CONFIG["num_hidden_layers"]
LORA = {
    "plain": ((), 7 * LAYERS, 2.0),
    "rslora": (("lora.use_rslora=true",), 7 * LAYERS, 4.0),
    "dora": (("lora.use_dora=true",), 7 * LAYERS, 2.0),
    "dropout": (("lora.dropout=0.3",), 7 * LAYERS, 2.0),
    "alpha": (("lora.alpha=2",), 7 * LAYERS, 0.5),
    "two targets": (("lora.target_modules=[q_proj, down_proj]",), 2 * LAYERS, 2.0),
}


@pytest.mark.parametrize("kind", LORA)
def test_kinds_of_lora(world: World, kind: str, tmp_path: Path):
    """Trained for a few steps: the right layers and scale, and PEFT's own forward of the written folder agrees."""
    arguments, num_layers, scale = LORA[kind]
    trained = world.train("optim.lr=0.01", *arguments)
    config = json.loads((trained.folder / "adapter/adapter_config.json").read_text())
    layers = [module for module in trained.model.lm.modules() if hasattr(module, "lora_A")]
    assert len(layers) == num_layers
    assert {layer.scaling["default"] for layer in layers} == {scale}
    assert config["use_rslora"] == (kind == "rslora") and config["use_dora"] == (kind == "dora")
    sequences = [sequence(20, 1), sequence(30, 2)]
    base = AutoModelForCausalLM.from_pretrained(trained.folder / "base", dtype=torch.float32)
    untouched = plain_logps(base, sequences)
    lm = PeftModel.from_pretrained(base, trained.folder / "adapter").eval()
    with torch.no_grad():
        packed_logps = trained.model.eval()(packed(*sequences)).logps.double()
        assert difference(packed_logps, plain_logps(lm, sequences)) <= TOLERANCE
    assert difference(packed_logps, untouched) > 1e-3  # it did train


def test_dropout_is_on_in_training_and_off_in_evaluation(world: World):
    model, batch = world.load("lora.dropout=0.5"), packed(sequence(20, 1))
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # fresh ones are zero: no mask would show
    with torch.no_grad():
        assert not torch.equal(model(batch).logps, model(batch).logps)
        model.eval()
        assert torch.equal(model(batch).logps, model(batch).logps)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3: query and key norms, a head dimension of its own, an untied head."""
    folder = shutil.copytree(TINY / "model", tmp_path_factory.mktemp("qwen3") / "model")
    config = json.loads((folder / "config.json").read_text())
    changes = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 24, "tie_word_embeddings": False,
        "attention_bias": False, "num_hidden_layers": LAYERS,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("arguments", [(), ("lora.enabled=false",)])
def test_qwen3(world: World, qwen3: Path, arguments: tuple[str, ...]):
    trained = world.train(f"model.path={qwen3}", "optim.lr=0.01", *arguments)
    assert trained.log[-1]["train/loss"] < trained.log[0]["train/loss"]
    if arguments:
        lm = AutoModelForCausalLM.from_pretrained(trained.folder / "model", dtype=torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(trained.folder / "base", dtype=torch.float32)
        lm = PeftModel.from_pretrained(base, trained.folder / "adapter")
    sequences = [sequence(20, 1), sequence(30, 2)]
    with torch.no_grad():
        ours, plain = trained.model.eval()(packed(*sequences)).logps, plain_logps(lm.eval(), sequences)
    assert difference(ours, plain) <= TOLERANCE
    assert any("q_norm" in name for name, _ in lm.named_parameters())


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_their_batch(start: Trained, monkeypatch: pytest.MonkeyPatch):
    """Batched, one by one, two at a time, in another order: the same greedy ids, in the order of the prompts."""
    prompts = [sequence(length, length)[0].tolist() for length in (3, 30, 11, 1, 19)]
    together = start.model.sample(prompts, 12)
    assert together == [start.model.sample([prompt], 12)[0] for prompt in prompts]
    assert together[::-1] == start.model.sample(prompts[::-1], 12)
    assert len({tuple(answer) for answer in together}) > 1
    assert start.model.sample([], 12) == []
    monkeypatch.setattr("qwen_train.model.packed.SAMPLED_TOGETHER", 2)
    assert together == start.model.sample(prompts, 12)


def test_samples_are_the_likeliest_tokens(start: Trained):
    """Each token is the argmax of a plain forward of all before it, and nothing follows an end token."""
    prompt = sequence(9, 4)[0].tolist()
    (answer,) = start.model.sample([prompt], 12)
    base = AutoModelForCausalLM.from_pretrained(start.folder / "base", dtype=torch.float32)
    lm = PeftModel.from_pretrained(base, start.folder / "adapter").eval()
    with torch.no_grad():
        for position, token in enumerate(answer):
            logits = lm(input_ids=torch.tensor([prompt + answer[:position]])).logits[0, -1]
            assert int(logits.argmax()) == token
    assert start.model.end_token not in answer[:-1]
    assert len(answer) == 12 or answer[-1] == start.model.end_token


def test_samples_are_greedy_whatever_the_model_folder_says(start: Trained):
    """Qwen2.5-7B-Instruct's generation_config.json punishes repetition by 1.05."""
    lm, prompt = start.model.causal_lm, [5] * 9
    plain = start.model.sample([prompt], 12)
    own = lm.generation_config
    lm.generation_config = GenerationConfig(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=12)
    try:
        assert start.model.sample([prompt], 12) == plain
        assert lm.generation_config.repetition_penalty == 1.3, "afterwards it is the model's again"
        with start.model._answering():  # the negative control
            lm.generation_config = GenerationConfig(repetition_penalty=1.3)
            punished = lm.generate(torch.tensor([prompt]), max_new_tokens=12, pad_token_id=start.model.pad_token)
        assert punished[0, 9 : 9 + len(plain[0])].tolist() != plain[0]
    finally:
        lm.generation_config = own


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [(), ("model.checkpoint_layers=3", "lora.dropout=0.5")])
def test_sampling_leaves_the_model_as_it_was(world: World, training: bool, arguments: tuple[str, ...]):
    model = world.load(*arguments).train(training)
    batch = packed(sequence(20, 1))
    torch.manual_seed(0)
    before = model(batch).logps
    model.sample([[5, 6, 7]], 4)
    assert model.training == training and all(module.training == training for module in model.modules())
    torch.manual_seed(0)
    after = model(batch).logps
    assert torch.equal(before, after) and after.requires_grad
    assert model.causal_lm.config._attn_implementation == "qwen_train"


def test_sampling_ends_when_it_is_told_to(world: World):
    model, prompts = world.load(), [[5, 6, 7], [8]]
    whole = model.sample(prompts, 12)
    calls: list[int] = []

    def stop() -> bool:
        calls.append(1)
        return len(calls) == 3

    assert model.sample(prompts, 12, stop=stop) == [answer[:3] for answer in whole] and len(calls) == 3
    assert max(map(len, whole)) > 3 and model.sample(prompts, 12) == whole


def test_sampling_restores_after_an_error(world: World, monkeypatch: pytest.MonkeyPatch):
    model = world.load()

    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model.causal_lm), "generate", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.sample([[5]], 4)
    assert model.training and model.causal_lm.config._attn_implementation == "qwen_train"
    assert len(model(packed(sequence(20, 1))).logps) == 10


# --- what a run hands over --------------------------------------------------------------------------------------------


def test_the_adapter_folder_is_the_trained_model(start: Trained, world: World):
    """Logits of PeftModel.from_pretrained on the base that the adapter itself names, against the model in training."""
    config = json.loads((start.folder / "adapter/adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    ids = torch.tensor(sequence(40, 5)[0])[None]
    trained = start.model.eval().causal_lm
    implementation = trained.config._attn_implementation
    trained.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            expected, without = trained(input_ids=ids).logits, base(input_ids=ids).logits
            loaded = PeftModel.from_pretrained(base, start.folder / "adapter").eval()(input_ids=ids).logits
    finally:
        trained.set_attn_implementation(implementation)
    assert difference(loaded, expected) <= TOLERANCE
    assert difference(without, expected) > 1e-2


def test_the_model_folder_is_the_trained_model(world: World):
    trained = world.train("lora.enabled=false")
    folder = trained.folder / "model"
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert lm.dtype == torch.float32 and lm.lm_head.weight is lm.model.embed_tokens.weight
    state = trained.model.causal_lm.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in lm.state_dict().items())
    assert lm.generation_config.eos_token_id == trained.model.end_token
    assert not (trained.folder / "base").exists()
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("name", ["adapter", "base"])
def test_the_tokenizer_folder_renders_the_same(start: Trained, name: str):
    folder = start.folder / name
    assert (folder / "chat_template.jinja").read_text() == (TINY / "model/chat_template.jinja").read_text()
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(TINY / "model")
    turns = [{"role": "user", "content": "Hi <|im_end|> ä\n"}, {"role": "assistant", "content": "Hello"}]
    conversations = [turns, [{"role": "system", "content": "Be kind."}, *turns, turns[0]], turns * 3]
    for messages in conversations:
        for tools in (None, [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]):
            for prompt in (False, True):
                given: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
                text = theirs.apply_chat_template(messages, tokenize=False, **given)
                assert ours.apply_chat_template(messages, tokenize=False, **given) == text
                assert ours.encode(text) == theirs.encode(text)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors, None),
        (lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, None),  # old files
        (lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, None),  # tied
        (lambda tensors: {name: tensors[name] for name in tensors if name != UP}, f"{UP} is missing"),
        (
            lambda tensors: {name: tensors[name] for name in tensors if ".mlp." not in name},
            r"\(and 5 more\) is missing",
        ),
        (lambda tensors: tensors | {UP: tensors[UP][:-8].clone()}, f"{UP} has another shape than its config.json says"),
        (
            lambda tensors: tensors | {"v_head.weight": torch.ones(3)},
            "v_head.weight has no place in the model",
        ),
    ],
    ids=["whole", "inv_freq", "tied head", "one missing", "many missing", "another shape", "one more"],
)
def test_weights_that_are_not_all_read(
    start: Trained, world: World, tmp_path: Path, quantization: str, change: Any, said: str | None
):
    """transformers draws at random what is missing, leaves out what has no place, and goes on."""
    folder = tmp_path / "model"
    shutil.copytree(start.folder / "base", folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    words = [f"model.path={folder}", "model.from_scratch=false", f"model.quantization={quantization}"]
    words += ["model.dtype=bfloat16"] * (quantization == "nf4")
    if said is None:
        world.load(*words)
    else:
        with pytest.raises(ValueError, match=f"^model.path: cannot read weights from {folder}: .*{said}.*; check"):
            world.load(*words)
        with pytest.raises(ValueError, match=f"^{folder}: cannot be read as a model: .*{said}.*; give the base"):
            load_plainly(str(folder), torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("kept", [-1000, 0, 100], ids=["cut off", "empty", "header only"])
def test_weights_that_are_damaged(start: Trained, world: World, tmp_path: Path, kept: int):
    """safetensors has an error of its own for them, which is neither an OSError nor a ValueError."""
    folder = tmp_path / "model"
    shutil.copytree(start.folder / "base", folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=rf"^model.path: cannot read weights from {folder}: .* is damaged \(.*\); check"
    ):
        world.load(f"model.path={folder}", "model.from_scratch=false")
    with pytest.raises(ValueError, match=rf"^{folder}: cannot be read as a model: .* is damaged \(.*; give the base"):
        load_plainly(str(folder), torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("I/O error: No space left on device (os error 28)", "free some space, or point run.dir"),
        ("I/O error: Permission denied (os error 13)", "check the path and its permissions"),
        ("InvalidHeader", "check the path and its permissions"),
    ],
)
def test_a_base_that_cannot_be_written(world: World, tmp_path: Path, monkeypatch, reason: str, said: str):
    """The library's own error has the system's number in its text only."""

    def failing(*_: Any, **__: Any) -> None:
        raise SafetensorError(f"Error while serializing: {reason}")

    lm, base = world.load().causal_lm, tmp_path / "base"
    monkeypatch.setattr(type(lm), "save_pretrained", failing)
    with pytest.raises(OSError, match="the base could not be written") as caught:
        _write_base(lm, AutoTokenizer.from_pretrained(TINY / "model"), base)
    outcome, line = _explained(caught.value) or ("", "")
    assert outcome == "failed" and line.startswith(f"{base}: the base could not be written: ") and f"; {said}" in line
    assert list(tmp_path.iterdir()) == []


def test_a_base_is_on_the_disk_before_and_after_it_is_named(world: World, tmp_path: Path, monkeypatch):
    """Its files and their names in the scratch folder, then its own name in the run's."""
    done: list[str] = []
    sync, replace_ = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("renamed"), replace_(old, new)))
    _write_base(world.load().causal_lm, AutoTokenizer.from_pretrained(TINY / "model"), tmp_path / "base")
    renamed = done.index("renamed")
    (scratch,) = {Path(path).parent for path in done[: renamed - 1]}
    assert {Path(path).name for path in done[: renamed - 1]} == {path.name for path in (tmp_path / "base").iterdir()}
    assert done[renamed - 1] == str(scratch) and done[renamed + 1 :] == [str(tmp_path)]


def test_a_continued_adapter_keeps_its_rank(world: World, start: Trained, on_start: tuple[str, ...], monkeypatch):
    """On the card, and where `settle` counts the optimizer's states that are to come."""
    adapter = start.folder / "adapter"
    coming: list[tuple[int, int]] = []
    settle = sft.settle

    def settling(run: Run, given: Any, config: Any, model: PackedLM, optimizer: Any, longest: int, shape: Any) -> Any:
        coming.append(
            (estimate_memory(given, shape, 100, 0, sharding=WHOLE).optimizer, 8 * (num_adapter_parameters(model) or 0))
        )
        return settle(run, given, config, model, optimizer, longest, shape)

    monkeypatch.setattr(sft, "settle", settling)
    trained = world.train(f"model.adapter={adapter}", "model.adapter_start=continue", "run.steps=1", *on_start)
    assert json.loads((trained.folder / "adapter/adapter_config.json").read_text())["r"] == 4
    assert len(coming) == 1 and coming[0][0] == coming[0][1] > 0
    assert (
        "The adapter's rank is 4; of the ranks that vLLM takes, 8 is the next"
        in (trained.folder / "README.md").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logged_norm_is_that_before_clipping(own_signals: None, dtype: torch.dtype):
    """In fp32 also of bf16 gradients, whose rounding must not be that of the norm."""
    layer = nn.Linear(40, 30).to(dtype)
    layer(torch.randn(5, 40, dtype=dtype)).float().pow(2).sum().backward()

    def norm() -> float:
        return float(torch.cat([p.grad.float().flatten() for p in layer.parameters() if p.grad is not None]).norm())

    run, before = Run(seed=0, deterministic=False), norm()
    assert run.clip_grad_norm(layer, before / 10) == pytest.approx(before, rel=1e-5)
    assert norm() == pytest.approx(before / 10, rel=1e-4 if dtype == torch.float32 else 3e-3)
    assert run.clip_grad_norm(layer, 0) == pytest.approx(norm(), rel=1e-5), "0 clips nothing"


def test_pad_and_end_must_differ():
    class OneForBoth:
        def convert_tokens_to_ids(self, _token: str) -> int:
            return 7

    with pytest.raises(ValueError, match="got ids 7 and 7"):
        special_tokens(OneForBoth(), "qwen2")  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model_is_refused(world: World):
    """Otherwise an index error at the first batch, or the death of the GPU's context."""
    config = with_candidate(world.config(), recomputed=0, tokens=4096)
    with pytest.raises(ValueError, match=r"have ids 151645 and 151643 in .* has 768 tokens"):
        load_model(config, mini_tokenizer(), torch.device("cpu"), None, is_main=False)


def test_data_tokens_that_the_model_has_not_are_refused(tmp_path: Path):
    """Of a tokenizer that is larger than the model; what the data do not hold may lie beyond its vocabulary."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": role, "content": "Hi."} for role in ("user", "assistant")]}))
    folder = tmp_path / "model"
    shutil.copytree(TINY / "model", folder)
    words = [f"--model.path={folder}", f"--data.train={rows}", f"--data.cache_dir={tmp_path}", "--data.workers=0"]
    config = load_config(SFTConfig, words)[0]
    tokenizer = load_tokenizer(config.model)
    run: Any = SimpleNamespace(main_first=lambda make: make(), require_alike=lambda *_: None, note=lambda *_: None)
    largest = load_split(run, config, "data.train", tokenizer).largest_id()
    assert largest == tokenizer.convert_tokens_to_ids("<|im_end|>") < len(tokenizer) - 1
    edit_json(folder / "config.json", vocab_size=largest + 1)
    load_split(run, config, "data.train", tokenizer)
    edit_json(folder / "config.json", vocab_size=largest)
    with pytest.raises(ValueError, match=rf"^data.train: .* ids up to {largest}, and its model has {largest} tokens"):
        load_split(run, config, "data.train", tokenizer)


UNREACHABLE = OSError("We couldn't connect to 'https://huggingface.co' to load the files")


@pytest.mark.parametrize("path", ["./qwen", "../qwen", "/none/qwen", "~/no qwen", "a/b/c", "models/qwen", "qwen"])
def test_a_folder_that_is_not_there(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Told as such where the path is no hub id, or its parent is here; of the hub only what else is one."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for kind in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", Mock(side_effect=UNREACHABLE))
    for read in (load_model_config, load_tokenizer):
        given = ModelConfig(path=path)
        with pytest.raises(ValueError, match=f"^model.path: the folder {given.path} does not exist; give a model's"):
            read(given)
        with pytest.raises(ValueError, match="models2/qwen is not a folder here, the hub could not be reached"):
            read(ModelConfig(path="models2/qwen"))


def test_a_damaged_folder_has_nothing_to_do_with_the_hub(tmp_path: Path):
    """Whatever its name: errors of a lost connection are told by a word in their text, where the path stands too."""
    folder = tmp_path / "connect"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{")
    for read, what in ((load_model_config, "model config"), (load_tokenizer, "tokenizer")):
        with pytest.raises(ValueError, match=f"^model.path: no {what} in {folder}: "):
            read(ModelConfig(path=str(folder)))
