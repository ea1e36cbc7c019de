"""Adapters and their bases: merge starts, two adapters as one, launch/merge.py, and what is refused."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qwen_train.config import DPOConfig, LoraConfig
from qwen_train.data.packing import Batch
from qwen_train.model import adapters, weights
from qwen_train.model.adapters import (
    REFERENCE_ADAPTER,
    base_fingerprint,
    check_template,
    concatenate_adapters,
    find_base,
    load_adapter,
    merge_adapter,
    resolve_start,
)
from qwen_train.model.load import _continued, _with_adapter, load_model, load_model_config, load_tokenizer
from qwen_train.model.packed import load_trainable, trainable_parameters
from qwen_train.model.shapes import known_shape
from qwen_train.model.weights import base_weights, place_of_weights
from qwen_train.output.merge import device_with_room, load_plainly, packed, score, write_joined
from qwen_train.output.merge import merge as merge_into
from tests.preferences import (
    batch_of,
    dpo_config,
    edit_adapter,
    edit_json,
    few_pairs,
    load,
    make_start,
    pairs_of,
    run_dpo,
)
from tests.scripts import TINY, FreshProcess, ScriptRunner, read_metrics

TOLERANCE = 1e-5  # nats, fp32
CPU = torch.device("cpu")
ON_A_GPU = [pytest.param(place, "cuda", marks=pytest.mark.gpu) for place in ("cuda", "cpu")]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, scripts: ScriptRunner, cache_dir: Path) -> Path:
    runner = FreshProcess() if torch.cuda.is_available() else scripts
    return make_start(runner, tmp_path_factory.mktemp("sft"), cache_dir)


@pytest.fixture(scope="module")
def base(start: Path) -> str:
    return str(start.parent / "base")


@pytest.fixture(scope="module")
def batch(start: Path, base: str, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Batch:
    data = pairs_of(dpo_config("--model.path", base), few_pairs(tmp_path_factory.mktemp("pairs")), cache_dir)
    return batch_of(data, range(6), share_prompt=False)


@pytest.fixture(scope="module")
def dpo(start: Path, tmp_path_factory: pytest.TempPathFactory, scripts: ScriptRunner, cache_dir: Path) -> Path:
    """The run folder of a DPO run that started from the merged SFT adapter and moved far."""
    folder = tmp_path_factory.mktemp("dpo")
    done = run_dpo(scripts, start, folder, cache_dir, "--optim.lr", "3e-3")
    assert done.code == 0, done.output
    assert "as one adapter of" in done.output
    return folder / "tiny-dpo"


def plain(base: str, adapter: Path | None, batch: Batch) -> Tensor:
    """Log-probabilities by what anybody loads: transformers, PEFT, and a full softmax over each plain sequence."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    logps = []
    for begin, end in zip(batch.cu_seqlens_q[:-1].tolist(), batch.cu_seqlens_q[1:].tolist(), strict=True):
        with torch.no_grad():
            logps.append(model(batch.input_ids[None, begin:end]).logits[0].log_softmax(-1))
    return torch.cat(logps)[batch.target_positions, batch.targets]


def trained(dpo: Path, start: Path, base: str, batch: Batch) -> Tensor:
    """The trained policy, put together as it was trained: the SFT adapter merged, the checkpoint's weights upon it."""
    model = load(dpo_config("--model.path", base, "--model.adapter", str(start), "--lora.r", "8"))
    (checkpoint,) = (dpo / "checkpoints").iterdir()
    load_trainable(model, load_file(checkpoint / "model.safetensors"))
    return score(model, batch)


def gap(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).abs().max())


def test_a_merge_start_is_the_adapters_policy(start: Path, base: str, batch: Batch) -> None:
    model = load(dpo_config("--model.path", base, "--model.adapter", str(start)))
    assert gap(score(model, batch), plain(base, start, batch)) <= TOLERANCE
    assert gap(score(model, batch), plain(base, None, batch)) > 1e-2, "the adapter changes something"


def nf4_start(start: Path, base: str) -> DPOConfig:
    nf4 = ("--model.quantization", "nf4", "--model.dtype", "bfloat16", "--lora.r", "4")
    return dpo_config("--model.path", base, "--model.adapter", str(start), *nf4)


def test_an_nf4_merge_start_is_never_whole_on_the_gpu(start: Path, base: str, monkeypatch, tmp_path: Path) -> None:
    """Without room there it is read and merged on the CPU, each layer quantised on its way; meta stands for a GPU."""
    monkeypatch.setattr(weights, "place_of_weights", lambda *_, **__: CPU)
    config, gpu = nf4_start(start, base), torch.device("meta")
    maps, sent = [], []
    read, to = AutoModelForCausalLM.from_pretrained, bnb.nn.Params4bit.to

    def reading(*given: Any, **named: Any) -> Any:
        maps.append(named["device_map"])
        return read(*given, **named)

    def sending(weight: bnb.nn.Params4bit, *where: Any, **named: Any) -> Any:
        if not weight.bnb_quantized:
            sent.append((weight.device, weight.dtype, *where))
            to(weight, CPU)  # bitsandbytes quantises nothing on the meta device
        return weight

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reading)
    monkeypatch.setattr(bnb.nn.Params4bit, "to", sending)
    shape = load_model_config(config.model)
    tokenizer = load_tokenizer(config.model)
    lm = _with_adapter(base_weights(config, shape, tokenizer, gpu, tmp_path / "base", False, on_cpu=False), config)
    assert maps == [{"": CPU}]
    assert sent == [(CPU, torch.bfloat16, gpu)] * (7 * shape.num_hidden_layers)
    rest = [name for name, p in lm.named_parameters() if p.device == CPU and "lora_" not in name]
    assert len(rest) == len(sent) and all(name.endswith("_proj.base_layer.weight") for name in rest)


@pytest.mark.parametrize(("place", "device"), [("cpu", "cpu"), *ON_A_GPU])
def test_an_nf4_merge_start_quantises_the_merged_weights(
    place: str, device: str, start: Path, base: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they are merged. Training steps and adapters written change no byte of them."""
    monkeypatch.setattr(weights, "place_of_weights", lambda *_, **__: torch.device(place))
    model = load(nf4_start(start, base), device=device)
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in trainable_parameters(model).items()}
    for _ in range(2):
        model(batch.to(torch.device(device))).logps.sum().backward()
        optimizer.step()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainable_parameters(model).items())
    merged = merge_adapter(load_plainly(base, torch.bfloat16, CPU), start)
    for name, linear in model.causal_lm.named_modules():
        if isinstance(linear, bnb.nn.Linear4bit):
            weight = merged.get_submodule(name.removesuffix(".base_layer")).weight
            packed, state = bnb.functional.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
            assert torch.equal(linear.weight, packed), name
            kept = linear.weight.quant_state
            assert kept.nested and torch.equal(kept.absmax, state.absmax) and torch.equal(kept.offset, state.offset)
            assert torch.equal(kept.state2.absmax, state.state2.absmax)
    assert torch.equal(model.causal_lm.lm_head.weight.cpu(), merged.lm_head.weight)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nf4_weights_that_nobody_keeps_are_drawn_a_layer_at_a_time(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a measurement needs no room for the model in bfloat16, on the card or beside it."""
    given = ("--model.path", str(TINY / "model"), "--model.from_scratch", "true", "--model.quantization", "nf4")
    config = dpo_config(*given, "--model.dtype", "bfloat16", "--lora.r", "4")
    dense, largest = 0, 0
    to_empty, to = torch.nn.Module.to_empty, bnb.nn.Params4bit.to

    def emptying(module: torch.nn.Module, **where: Any) -> torch.nn.Module:
        nonlocal dense, largest
        dense += sum(isinstance(part, torch.nn.Linear) for part in module.modules())
        largest = max(largest, dense)
        return to_empty(module, **where)

    def quantising(weight: bnb.nn.Params4bit, *where: Any, **named: Any) -> Any:
        nonlocal dense
        dense -= not weight.bnb_quantized
        return to(weight, *where, **named)

    monkeypatch.setattr(torch.nn.Module, "to_empty", emptying)
    monkeypatch.setattr(bnb.nn.Params4bit, "to", quantising)
    model = load_model(config, load_tokenizer(config.model), torch.device(device), None, is_main=False)
    assert largest == 7, "linear layers of one decoder layer, in bfloat16"
    lm = model.causal_lm
    assert {tensor.device.type for tensor in (*lm.parameters(), *lm.buffers())} == {device}
    with torch.device(device):
        expected = AutoModelForCausalLM.from_config(lm.config, dtype=torch.bfloat16)
    assert torch.equal(lm.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == lm.config.tie_word_embeddings
    drawn = dict(lm.named_parameters())
    for name, tensor in expected.named_parameters():
        ours = drawn[name] if name in drawn else drawn[name.replace("proj.", "proj.base_layer.")]
        if getattr(ours, "quant_state", None) is not None:
            assert ours.quant_state.nested, name
            ours = bnb.functional.dequantize_4bit(ours, ours.quant_state)
        spread = tensor.float().std()
        assert abs(ours.float().std() - spread) <= 0.1 * spread, name
        assert abs(ours.float().mean() - tensor.float().mean()) <= 0.1 * spread, name


@pytest.mark.parametrize(("gigabytes", "place"), [(24, "cuda"), (16, "cpu")])
def test_weights_of_nf4_are_whole_where_there_is_room(
    gigabytes: int, place: str, monkeypatch: pytest.MonkeyPatch, start: Path, tmp_path: Path
) -> None:
    """15.2 GB in bfloat16. Whatever is quantised while it is read, or not at all, goes to the GPU."""
    cards = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: cards)
    shape, gpu, base = known_shape("Qwen/Qwen2.5-7B"), torch.device("cuda"), tmp_path / "base"
    drawn = dpo_config("--model.from_scratch", "true", "--model.quantization", "nf4", "--model.dtype", "bfloat16")
    assert place_of_weights(drawn, shape, gpu, base, draws=True).type == place
    dense = dpo_config("--model.from_scratch", "true")
    assert place_of_weights(dense, shape, gpu, base, draws=True) == gpu
    assert place_of_weights(drawn, shape, gpu, base, draws=False) == gpu
    assert place_of_weights(nf4_start(start, str(base)), shape, gpu, base, draws=False).type == place


def test_whether_weights_are_drawn_is_decided_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The main process may have written the base just after another one saw none: what is read has another place."""
    base = tmp_path / "base"
    monkeypatch.setattr(weights, "place_of_weights", lambda *_, **__: base.mkdir() or CPU)
    config = dpo_config("--model.path", str(TINY / "model"), "--model.from_scratch", "true")
    model = load_model(config, load_tokenizer(config.model), CPU, base, is_main=False)
    assert trainable_parameters(model) and list(base.iterdir()) == []


def test_a_plain_copy_is_on_the_card_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the config: the packed weights of an NF4 run say nothing of a plain copy's."""
    shape, gpu = known_shape("Qwen/Qwen2.5-72B"), torch.device("cuda")  # 72.7 billion parameters
    for dtype, free, place in (
        (torch.bfloat16, 170e9, "cpu"),
        (torch.bfloat16, 185e9, "cuda"),
        (torch.float32, 320e9, "cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        assert device_with_room(gpu, shape, dtype).type == place
    assert device_with_room(CPU, shape, torch.bfloat16) == CPU


def test_the_adapter_of_a_merge_start_holds_both_for_whoever_loads_it_plainly(
    dpo: Path, start: Path, base: str, batch: Batch
) -> None:
    policy = trained(dpo, start, base, batch)
    assert gap(plain(base, dpo / "adapter", batch), policy) <= TOLERANCE
    assert gap(plain(base, dpo / "adapter_delta", batch), policy) > 1e-2, "the DPO part alone is another model"
    assert gap(plain(base, start, batch), policy) > 1e-2
    config = json.loads((dpo / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4 + 8, 4 + 8, False)
    assert json.loads((dpo / "adapter" / "base.json").read_text()) == {
        "base_sha256": base_fingerprint(base),
        "base": base,
    }
    delta = json.loads((dpo / "adapter_delta" / "base.json").read_text())
    assert delta["merged"]["adapter"] == str(start) and len(delta["merged"]["adapter_sha256"]) == 64
    names = {file.name for file in (dpo / "adapter").iterdir()}
    assert {"README.md", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"} <= names


def test_the_card_of_a_joined_adapter_says_its_own_rank_and_start(dpo: Path, start: Path) -> None:
    text = (dpo / "adapter" / "README.md").read_text()
    run = start.parent.name
    assert f"| start | {run}/adapter, merged |" in text and "| rank | 12: 4 of the start and 8 of this run |" in text
    assert "--max-lora-rank 16" in text and "rank is 12;" in text
    assert f"base_model: {run}/base\n" in text and str(start.parents[1]) not in text


@pytest.mark.parametrize("rslora", [False, True])
def test_concatenation_keeps_every_scale(rslora: bool, dpo: Path, start: Path, base: str, batch, tmp_path) -> None:
    """PEFT copies the first adapter's config, rank-stabilised scale included; ours must still be 1."""
    sft = edit_adapter(start, tmp_path / "sft", lambda name, tensor: tensor)
    edit_json(sft / "adapter_config.json", use_rslora=rslora, lora_alpha=3)
    joined = concatenate_adapters(load_plainly(base, torch.float32, CPU), [sft, dpo / "adapter_delta"])
    joined.save_pretrained(str(tmp_path / "out"))
    alone = load_plainly(base, torch.float32, CPU)
    merged = PeftModel.from_pretrained(alone, str(sft)).merge_and_unload()
    merged = PeftModel.from_pretrained(merged, str(dpo / "adapter_delta")).merge_and_unload()
    expected = score(packed(merged, load_tokenizer(dpo_config("--model.path", base).model)), batch)
    assert gap(plain(base, tmp_path / "out", batch), expected) <= TOLERANCE


PLAIN: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "rank-stabilised": {"use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "several ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, "down_proj": 8},
        "alpha_pattern": {"v_proj": 21},
    },
    "some layers": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    "all but one kind": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
}
MORE: dict[str, dict[str, Any]] = {
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "trainable_token_indices": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
}


def foreign_adapter(base: str, folder: Path, *, save: bool = False, **settings: Any) -> Path:
    """An adapter as another tool writes it, far from zero."""
    torch.manual_seed(7)
    model = get_peft_model(load_plainly(base, torch.float32, CPU), peft.LoraConfig(r=5, lora_alpha=7, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(folder), save_embedding_layers=save)
    return folder


@pytest.mark.parametrize("kind", PLAIN)
def test_adapters_of_other_tools_as_one(kind: str, dpo: Path, base: str, batch: Batch, tmp_path: Path) -> None:
    """What their configs restrict holds for their own part alone; in bf16 the joined one stays fp32."""
    delta = dpo / "adapter_delta"
    other = foreign_adapter(base, tmp_path / "other", **PLAIN[kind])
    joined = concatenate_adapters(load_plainly(base, torch.bfloat16, CPU), [other, delta])
    joined.save_pretrained(str(tmp_path / "out"))
    merged = PeftModel.from_pretrained(load_plainly(base, torch.float32, CPU), str(other)).merge_and_unload()
    merged = PeftModel.from_pretrained(merged, str(delta)).merge_and_unload()
    expected = score(packed(merged, load_tokenizer(dpo_config("--model.path", base).model)), batch)
    assert gap(plain(base, tmp_path / "out", batch), expected) <= TOLERANCE
    assert gap(plain(base, delta, batch), expected) > 1e-2, "the other adapter does something"


@pytest.mark.parametrize("kind", MORE)
def test_adapters_that_are_more_than_two_matrices_are_not_concatenated(
    kind: str, dpo: Path, base: str, tmp_path: Path
) -> None:
    other = foreign_adapter(base, tmp_path / "other", **MORE[kind])
    with pytest.raises(ValueError, match=rf"{kind}.* cannot be concatenated"):
        concatenate_adapters(load_plainly(base, torch.float32, CPU), [other, dpo / "adapter_delta"])


def test_what_differs_from_the_trained_policy_is_not_handed_over(
    dpo: Path, start: Path, base: str, batch: Batch, tmp_path: Path
) -> None:
    """The joined adapter and the merged model are both measured; here against a policy that is neither."""
    tokenizer = load_tokenizer(dpo_config("--model.path", base).model)
    trained = packed(load_plainly(base, torch.float32, CPU), tokenizer)
    expected = score(trained, batch)
    delta, target = dpo / "adapter_delta", tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"not the trained policy \(.* the run's part alone is .*adapter_delta"):
        write_joined(str(start), delta, target, base, trained, tokenizer, batch, expected, tolerance=1e-3)
    assert list(tmp_path.iterdir()) == []
    assert write_joined(str(start), delta, target, base, trained, tokenizer, batch, expected, math.inf).r == 12


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_head_is_not_merged_into(name: str, base: str, tmp_path: Path) -> None:
    tied = AutoConfig.from_pretrained(base)
    tied.tie_word_embeddings = True
    folder = tmp_path / "tied"
    AutoModelForCausalLM.from_config(tied).save_pretrained(folder)
    other = foreign_adapter(str(folder), tmp_path / "other", target_modules=["q_proj"], modules_to_save=[name])
    with pytest.raises(ValueError, match="which are one tensor in this base"):
        merge_adapter(load_plainly(str(folder), torch.float32, CPU), other)


def test_a_full_card_is_not_the_adapters_fault(start: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: PeftModel) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PeftModel, "merge_and_unload", full, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        merge_adapter(load_plainly(base, torch.float32, CPU), start)


def test_an_adapter_that_cannot_be_continued(start: Path, base: str, tmp_path: Path) -> None:
    continued = ("--model.path", base, "--model.adapter_start", "continue", "--model.adapter")
    head = foreign_adapter(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"model\.adapter: .*head cannot be continued \(.*; use adapter_start merge"):
        resolve_start(dpo_config(*continued, str(head)))
    fp8 = ("--model.quantization", "fp8", "--model.dtype", "bfloat16")
    dropout = foreign_adapter(base, tmp_path / "dropout", target_modules=["q_proj"], lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout has lora\.dropout 0\.1, and an fp8 base takes plain LoRA only"):
        resolve_start(dpo_config(*continued, str(dropout), *fp8))
    resolve_start(dpo_config(*continued, str(start), *fp8))


def of_base(base: str) -> PreTrainedModel:
    return load_plainly(base, torch.float32, CPU)


def reference_copy(base: str, start: Path, adapter: Path) -> PeftModel:
    return load_adapter(load_adapter(of_base(base), start, is_trainable=True), adapter, REFERENCE_ADAPTER)


READERS: dict[str, Callable[[str, Path, Path, Path], object]] = {
    "continue": lambda base, start, adapter, out: _continued(of_base(base), str(adapter)),
    "reference": lambda base, start, adapter, out: reference_copy(base, start, adapter),
    "merge": lambda base, start, adapter, out: merge_adapter(of_base(base), adapter),
    "first of two": lambda base, start, adapter, out: concatenate_adapters(of_base(base), [adapter, start]),
    "second of two": lambda base, start, adapter, out: concatenate_adapters(of_base(base), [start, adapter]),
    "launch/merge.py": lambda base, start, adapter, out: merge_into(str(adapter), str(out), base),
}
"""What reads an adapter folder: of the base, a good adapter, the one in question and a folder to write."""


@pytest.mark.parametrize("reader", READERS)
def test_an_adapter_is_read_whole_or_not_at_all(reader: str, start: Path, base: str, tmp_path: Path) -> None:
    """PEFT draws what is missing, leaves out what has no place, and warns; a damaged file has an error of its own."""
    adapter = Path(shutil.copytree(start, tmp_path / "adapter"))
    READERS[reader](base, start, adapter, tmp_path / "out")
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    cases: list[tuple[Any, str]] = [
        ({name: whole[name] for name in whole if "layers.1.mlp" not in name}, r"\(and 5 more\) is in one"),
        (whole | {name.replace("rs.1", "rs.2"): whole[name].clone() for name in whole}, "layers.2.* is in one of them"),
        ({name: whole[name][:2].clone() for name in whole}, "cannot be loaded .RuntimeError: .*size mismatch"),
        (None, "cannot be loaded .SafetensorError: "),
    ]
    for tensors, said in cases:
        if tensors is None:
            file.write_bytes(file.read_bytes()[:-50])
        else:
            save_file(tensors, file)
        with pytest.raises(ValueError, match=rf"^model\.adapter: {adapter} .*{said}.*; .* again$") as refused:
            READERS[reader](base, start, adapter, tmp_path / "no")
        assert "\n" not in str(refused.value) and not (tmp_path / "no").exists()


def test_an_adapter_of_layers_that_the_base_has_not(start: Path, base: str, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(start, tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", target_modules=["c_proj"])
    with pytest.raises(ValueError, match=rf"^model\.adapter: {adapter} cannot be loaded .*c_proj.* again$"):
        merge_adapter(of_base(base), adapter)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"rank_pattern": {"q_proj": 3}}])
def test_adapters_of_other_tools_are_continued(
    settings: dict[str, Any], base: str, batch: Batch, tmp_path: Path
) -> None:
    other = foreign_adapter(base, tmp_path / "other", target_modules="all-linear", **settings)
    config = dpo_config("--model.path", base, "--model.adapter", str(other), "--model.adapter_start", "continue")
    assert gap(score(load(config), batch), plain(base, other, batch)) <= TOLERANCE


WHOLE_KINDS: dict[str, dict[str, Any]] = {
    **PLAIN,
    **MORE,
    "bias all": {"target_modules": ["q_proj"], "bias": "all"},
    "a pattern": {"target_modules": r".*layers\.1\..*\.(q|up)_proj"},
    "embedding saved": {"target_modules": ["q_proj"], "save": True},
    "embedding changed and saved": {"target_modules": ["q_proj", "embed_tokens"], "save": True},
}


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_adapters_of_other_tools_are_whole(kind: str, base: str, tmp_path: Path) -> None:
    other = foreign_adapter(base, tmp_path / "other", **WHOLE_KINDS[kind])
    ours, theirs = load_adapter(of_base(base), other), PeftModel.from_pretrained(of_base(base), other)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = ours(ids).logits
        assert torch.equal(logits, theirs(ids).logits) and not torch.equal(logits, of_base(base)(ids).logits)
    file = other / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[max(tensors)]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"^model\.adapter: {other} and its base do not fit: .* again$"):
        load_adapter(of_base(base), other)


def test_an_adapter_that_cannot_be_merged_is_refused_in_one_line(base: str, tmp_path: Path) -> None:
    other = foreign_adapter(base, tmp_path / "other", target_modules=["o_proj"], lora_bias=True)
    with pytest.raises(ValueError, match=r"other cannot be merged: "):
        merge_adapter(load_plainly(base, torch.float32, CPU), other)


@pytest.mark.launch
def test_dora_is_written_merged(start: Path, base: str, batch, tmp_path, scripts, cache_dir) -> None:
    done = run_dpo(scripts, start, tmp_path, cache_dir, "--lora.use_dora", "true", "--optim.lr", "3e-3")
    assert done.code == 0, done.output
    folder = tmp_path / "tiny-dpo"
    assert not (folder / "adapter").exists() and (folder / "adapter_delta").exists()
    assert "DoRA adapters cannot be concatenated" in done.output
    (note,) = [line for line in done.lines if line.startswith("model/:")]
    assert float(note.split("policy by ")[1].split()[0]) <= TOLERANCE
    assert gap(plain(str(folder / "model"), None, batch), plain(base, start, batch)) > 1e-2


# --- Which base


def test_the_base_is_the_adapters_own(start: Path, base: str, tmp_path: Path) -> None:
    config, notes = resolve_start(dpo_config("--model.path", "anything", "--model.adapter", str(start)))
    assert config.model.path == base and notes == [f"start: {start}, merged, on {base}"]
    moved = shutil.copytree(start.parent, tmp_path / "moved")
    edit_json(moved / "adapter" / "adapter_config.json", base_model_name_or_path="runs/gone/base")
    config, _ = resolve_start(dpo_config("--model.path", "x", "--model.adapter", str(moved / "adapter")))
    assert config.model.path == str(moved / "base")


def test_the_base_of_a_moved_project_is_found_by_its_relative_name(start: Path, base: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(start, "adapter"), shutil.copytree(base, "models/base")
    edit_json(Path("adapter/adapter_config.json"), base_model_name_or_path="/gone/models/base")
    edit_json(Path("adapter/base.json"), base="models/base")
    assert find_base("adapter") == "models/base"
    edit_json(Path("adapter/base.json"), base="models/another")
    assert find_base("adapter") is None


def test_an_adapter_that_goes_on_keeps_its_own_settings(start: Path, tmp_path: Path) -> None:
    own = tmp_path / "continued" / "adapter"
    shutil.copytree(start, own)
    changes = {"r": 6, "lora_alpha": 9, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["v_proj", "q_proj"]}
    edit_json(own / "adapter_config.json", **changes)
    given = dpo_config("--model.path", "x", "--model.adapter", str(own), "--model.adapter_start", "continue")
    config, notes = resolve_start(given)
    assert config.lora == LoraConfig(r=6, alpha=9.0, dropout=0.1, use_rslora=True, target_modules=["q_proj", "v_proj"])
    assert notes == [f"start: {own}, to be continued, on {config.model.path}"]
    merged, _ = resolve_start(dpo_config("--model.path", "x", "--model.adapter", str(own)))
    assert merged.lora == given.lora != config.lora, "a fresh adapter is as the config says"


def test_an_adapter_of_another_kind_is_refused(start: Path, tmp_path: Path) -> None:
    own = shutil.copytree(start, tmp_path / "adapter")
    (own / "adapter_config.json").write_text('{"peft_type": "IA3", "base_model_name_or_path": "x"}')
    with pytest.raises(ValueError, match=r"is an adapter of type .*IA3; give a LoRA adapter"):
        resolve_start(dpo_config("--model.path", "x", "--model.adapter", str(own)))


def test_another_base_is_refused_by_its_weights(start: Path, base: str, dpo: Path, tmp_path: Path) -> None:
    same = shutil.copytree(base, tmp_path / "same")
    config, _ = resolve_start(dpo_config("--model.path", str(same), "--model.adapter", str(start)))
    assert config.model.path == str(same), "the same weights in another place"
    other = load_plainly(base, torch.float32, CPU)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    words = ["--model.path", str(tmp_path / "other"), "--model.adapter"]
    with pytest.raises(ValueError, match=r"is not the base that .* was trained on .* --model.adapter null starts from"):
        resolve_start(dpo_config(*words, str(start)))
    alone, notes = resolve_start(dpo_config(*words, "null"))
    assert notes == [f"start: the base, {tmp_path / 'other'}"] and alone.model.adapter is None
    with pytest.raises(ValueError, match="merged into it; give the folder of that merge"):
        resolve_start(dpo_config("--model.path", base, "--model.adapter", str(dpo / "adapter_delta")))


def test_a_base_is_sampled_once(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check of an adapter and by the start of its run; anew when its file has been written again."""
    path, sampled, real = shutil.copytree(base, tmp_path / "base"), [], adapters._sampled
    monkeypatch.setattr(adapters, "_sampled", lambda file, name: sampled.append(name) or real(file, name))
    before = base_fingerprint(str(path))
    assert before == base_fingerprint(str(path)) and len(sampled) == len(set(sampled)) > 10
    other = load_plainly(base, torch.float32, CPU)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    other.save_pretrained(path)
    assert base_fingerprint(str(path)) != before


def test_a_given_base_is_looked_for_at_its_revision(
    start: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's cache, which may hold no other; with the adapter's own base it would be passed over in silence."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    given = tmp_path / "models--someone--base"
    (given / "refs").mkdir(parents=True)
    (given / "refs/v1").write_text("0" * 40)
    shutil.copytree(base, given / "snapshots" / ("0" * 40))
    words = ("--model.path", "someone/base", "--model.adapter", str(start), "--model.revision")
    config, _ = resolve_start(dpo_config(*words, "v1"))
    assert (config.model.path, config.model.revision) == ("someone/base", "v1")
    config, _ = resolve_start(dpo_config(*words, "v2"))
    assert (config.model.path, config.model.revision) == (base, None), "not there"


def test_an_adapter_of_another_template_is_refused(start: Path) -> None:
    template = (start / "chat_template.jinja").read_text()
    check_template(str(start), template)
    with pytest.raises(ValueError, match=r"differs from the chat template of model.path's tokenizer"):
        check_template(str(start), template.replace("user", "human") + "x")


# --- launch/merge.py


def merge(scripts: ScriptRunner, tmp_path: Path, *arguments: str):
    return scripts.run(tmp_path / "merge.txt", "launch/merge.py", *arguments)


@pytest.mark.launch
def test_a_round_is_sft_dpo_merge_and_the_next_dpo(
    dpo: Path, start: Path, base: str, batch: Batch, tmp_path: Path, scripts: ScriptRunner, cache_dir: Path
) -> None:
    out = tmp_path / "merged"
    rows = few_pairs(tmp_path, 3)
    done = merge(scripts, tmp_path, "--adapter", str(dpo / "adapter"), "--out", str(out), "--rows", str(rows))
    assert done.code == 0, done.output
    (line,) = [line for line in done.lines if line.startswith("merged against adapter:")]
    assert float(line.split()[3]) <= TOLERANCE
    policy = trained(dpo, start, base, batch)
    assert gap(plain(str(out), None, batch), policy) <= TOLERANCE
    card = (out / "README.md").read_text()
    assert "merged against adapter, mean difference" in card and "base_model_relation: finetune" in card
    assert f"| adapter | {dpo.name}/adapter |" in card
    files = {file.name for file in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= files
    assert all(name.endswith((".safetensors", ".json", ".jinja", ".md", ".txt")) for name in files)

    again = run_dpo(scripts, None, tmp_path / "round2", cache_dir, "--model.path", str(out))
    assert again.code == 0, again.output
    end, first = read_metrics(dpo)[-1], read_metrics(tmp_path / "round2" / "tiny-dpo")[0]
    assert first["eval/logps/chosen"] == pytest.approx(end["eval/logps/chosen"], abs=1e-4)
    assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-6)
    merged_sft = tmp_path / "merged-sft"
    assert merge(scripts, tmp_path, "--adapter", str(start), "--out", str(merged_sft)).code == 0
    delta = plain(str(merged_sft), dpo / "adapter_delta", batch)
    assert gap(delta, policy) <= TOLERANCE, "the DPO part on the merged folder gives the same"


@pytest.mark.launch
def test_merging_refuses_in_one_line(dpo: Path, base: str, start: Path, tmp_path, scripts) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    for arguments, message in [
        (("--adaptr", "x", "--out", str(tmp_path / "o")), "--adaptr: no such option; did you mean --adapter?"),
        (("--adapter", str(start)), "--out: needed, got nothing; give a folder"),
        (("--adapter", str(start), "--out", str(tmp_path / "o"), "--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
        (("--adapter", str(tmp_path), "--out", str(tmp_path / "o")), "is not an adapter folder"),
        (("--adapter", str(start), "--out", str(tmp_path / "full")), "exists already"),
        (("--adapter", str(start), "--out", str(tmp_path / "o"), "--rows", str(tmp_path / "rows.jsonl")), "no usable"),
        (("--adapter", str(dpo / "adapter_delta"), "--out", str(tmp_path / "o")), f"or take {dpo / 'adapter'},"),
        (("--adapter", str(dpo / "adapter_delta"), "--out", str(tmp_path / "o")), "give --base <folder of that merge>"),
        (("--adapter", str(dpo / "adapter_delta"), "--out", str(tmp_path / "o"), "--base", base), "merged into it"),
    ]:
        done = merge(scripts, tmp_path, *arguments)
        errors = [line for line in done.lines if line.startswith("error:")]
        assert done.code == 2 and len(errors) == 1 and message in errors[0], done.output
        assert not (tmp_path / "o").exists()


@pytest.mark.launch
@pytest.mark.parametrize("number", ["EROFS", "ENOSPC"])
def test_a_folder_that_cannot_be_written_is_one_line(start: Path, tmp_path, scripts, number: str) -> None:
    """A full disk names no file; a disk that is mounted to be read names the folder."""
    out = tmp_path / "o"
    name = "path" if number == "EROFS" else "None"
    prelude = (
        "import errno, os\nfrom pathlib import Path\nmkdir = Path.mkdir\n"
        "def refusing(path, *args, **kwargs):\n"
        f"    if str(path).startswith({str(out)!r}):\n"
        f"        raise OSError(errno.{number}, os.strerror(errno.{number}), {name})\n"
        "    mkdir(path, *args, **kwargs)\nPath.mkdir = refusing\n"
    )
    arguments = ("--adapter", str(start), "--out", str(out))
    done = scripts.run(tmp_path / "merge.txt", "launch/merge.py", *arguments, prelude=prelude)
    reason = os.strerror(getattr(errno, number))
    expected = f"error: --out: {out} cannot be written ({reason}); free space or choose another folder"
    assert (done.code, done.lines[-1]) == (1, expected), done.output
