"""Export: what PEFT, transformers and vLLM find is the trained model; a card says how to use it, and nothing secret."""

import copy
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from qwen_train.config import DataConfig, DPOConfig, ModelConfig, RunConfig, as_dict
from qwen_train.output import export
from qwen_train.output.export import (
    model_card,
    redacted,
    shown_path,
    write_adapter,
    write_full_model,
    write_model_card,
)
from qwen_train.train import files
from tests.faulty_disk import FaultyDisk, in_child, no_space

TINY = Path(__file__).parents[1] / "configs/tiny/model"
ROWS = torch.tensor([[5, 9, 77, 300, 12, 1000, 3, 8]])
OF_BASE = {"base_sha256": "0", "base": "there"}
PICKLES = re.compile(r"\.(bin|pt|pth|pkl|pickle|ckpt)$|training_args|\.metadata$")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def base_model(tied: bool = False) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024, eos_token_id=765, pad_token_id=763, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def adapted(base: Qwen2ForCausalLM, **options) -> PeftModel:
    """A LoRA of which both factors are random: it changes the logits."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (
                torch.randn_like(parameter).abs() if "magnitude" in name else torch.randn_like(parameter) / 5
            )
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(ROWS).logits


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Adapters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "named"), [("base", "{here}/base"), ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B")])
def test_the_base_is_found_from_any_working_directory(tmp_path, tokenizer, monkeypatch, base, named):
    monkeypatch.chdir(tmp_path)
    base_model().save_pretrained("base")
    write_adapter(tmp_path / "adapter", adapted(base_model()), None, tokenizer, base, OF_BASE)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == named.format(here=tmp_path)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_an_adapter_gives_the_trained_logits_to_who_loads_it(tmp_path, tokenizer, options):
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, **options)
    write_adapter(tmp_path / "adapter", model, None, tokenizer, str(tmp_path / "base"), OF_BASE)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert (logits(model) - logits(base)).abs().max() > 0.1  # the adapter does something
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["inference_mode"] is True and config["r"] == 4
    assert json.loads((tmp_path / "adapter" / "base.json").read_text()) == OF_BASE, "in the folder from the first"
    assert config["target_modules"] == sorted(config["target_modules"])
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-1] for name in config["target_modules"]} == linear
    assert not [name for name in files_below(tmp_path / "adapter") if PICKLES.search(name)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("spelling", ["in the model", "without the adapter's name", "whole model"])
def test_tensors_may_be_given_under_either_name(tmp_path, tokenizer, options, spelling):
    model = adapted(base_model(), **options)
    given = {
        name: tensor for name, tensor in model.state_dict().items() if "lora_" in name or spelling == "whole model"
    }
    if spelling == "without the adapter's name":
        given = {name.replace(".default.", "."): tensor for name, tensor in given.items()}
    given = {name: tensor + 1 for name, tensor in given.items()}  # the given ones count, not the model's own
    write_adapter(tmp_path / "adapter", model, given, tokenizer, "base", OF_BASE)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter").state_dict()
    adapter = {name: tensor for name, tensor in loaded.items() if "lora_" in name}
    assert len(adapter) == sum("lora_" in name for name in model.state_dict())
    for name, tensor in adapter.items():
        assert torch.equal(tensor, model.state_dict()[name] + 1), name


def test_a_missing_or_strange_tensor_is_refused_and_nothing_is_written(tmp_path, tokenizer):
    model = adapted(base_model())
    whole = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    first = min(whole)
    for broken in ({name: whole[name] for name in whole if name != first}, {**whole, "x.lora_A.weight": whole[first]}):
        with pytest.raises(RuntimeError, match=r"adapter: [01] tensors are missing .* nothing was written"):
            write_adapter(tmp_path / "adapter", model, broken, tokenizer, "base", OF_BASE)
    assert list(tmp_path.iterdir()) == []


def test_another_adapter_of_the_model_stays_behind(tmp_path, tokenizer):
    model = adapted(base_model())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    write_adapter(tmp_path / "adapter", model, None, tokenizer, "base", OF_BASE)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter")
    assert loaded.peft_config["default"].r == 4
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as stored:
        assert len(stored.keys()) == 2 * 7 * 2  # layers, linears, factors


def test_the_tokenizer_beside_the_weights_renders_the_same(tmp_path, tokenizer):
    write_adapter(tmp_path / "adapter", adapted(base_model()), None, tokenizer, "base", OF_BASE)
    assert (tmp_path / "adapter" / "chat_template.jinja").read_text() == (TINY / "chat_template.jinja").read_text()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1? <|im_end|> é"},
        {"role": "assistant", "content": "2"},
    ]
    for part in (messages, messages[1:], messages[:2]):
        assert loaded.apply_chat_template(part, tokenize=False) == tokenizer.apply_chat_template(part, tokenize=False)
        assert loaded.apply_chat_template(part)["input_ids"] == tokenizer.apply_chat_template(part)["input_ids"]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for name in files_below(tmp_path / "adapter"):
        assert str(TINY.parent) not in (tmp_path / "adapter" / name).read_bytes().decode(errors="ignore"), name


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, tokenizer, monkeypatch):
    model = adapted(base_model())
    target = tmp_path / "adapter"
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items() if "lora_" in name}

    def is_first() -> bool:
        [found] = [path for path in tmp_path.iterdir()]
        assert found == target
        loaded = PeftModel.from_pretrained(base_model(), target).state_dict()
        first = [torch.equal(loaded[name], model.state_dict()[name]) for name in changed]
        assert all(first) or not any(first)
        return first[0]

    write_adapter(target, model, None, tokenizer, "base", OF_BASE)
    (target / "old.txt").write_text("of the first export")
    counter = FaultyDisk()
    monkeypatch.setattr(files, "disk", counter)
    write_adapter(target, model, changed, tokenizer, "base", OF_BASE)
    assert not is_first() and not (target / "old.txt").exists()
    counter.names.clear()
    write_adapter(target, model, changed, tokenizer, "base", OF_BASE)
    replaced = []
    for at in range(len(counter.names)):
        monkeypatch.setattr(files, "disk", files.Disk())
        write_adapter(target, model, None, tokenizer, "base", OF_BASE)

        def die(at: int = at) -> None:
            files.disk = FaultyDisk(at)
            write_adapter(target, model, changed, tokenizer, "base", OF_BASE)

        assert in_child(die) == -signal.SIGKILL
        files.clean_leftovers(tmp_path)
        replaced.append(not is_first())
    assert replaced == sorted(replaced) and {*replaced} == {False, True}
    write_adapter(target, model, None, tokenizer, "base", OF_BASE)
    monkeypatch.setattr(files, "disk", FaultyDisk(0, no_space, only=("write",)))
    with pytest.raises(OSError, match="No space"):
        write_adapter(target, model, changed, tokenizer, "base", OF_BASE)
    assert is_first()


# Whole models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"], ids=["one file", "sharded"])
def test_a_full_model_loads_plainly(tmp_path, tokenizer, tied, shard_size, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", shard_size)
    model = base_model(tied)
    write_full_model(tmp_path / "model", model, None, tokenizer, dtype=None)
    names = files_below(tmp_path / "model")
    assert ("model.safetensors.index.json" in names) == (shard_size == "40KB")
    assert not [name for name in names if PICKLES.search(name)]
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {*names}
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(logits(loaded.eval()), logits(model))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["tie_word_embeddings"] is tied
    assert config["eos_token_id"] == 765
    assert os.fspath(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize(
    ("before", "after"), [(763, [765, 763]), (None, 765), ([763, 3], [765, 763, 3]), ([765, 763], [765, 763])]
)
def test_generation_ends_where_a_turn_does(tmp_path, before, after):
    """A base model and its tokenizer end at <|endoftext|> alone: what learnt <|im_end|> would run past it."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.eos_token = "<|endoftext|>"
    model = base_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = before
    write_full_model(tmp_path / "model", model, None, tokenizer)
    write_adapter(tmp_path / "adapter", adapted(base_model()), None, tokenizer, "base", OF_BASE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (loaded.generation_config.eos_token_id, loaded.config.eos_token_id) == (after, after)
    for folder in ("model", "adapter"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).eos_token == "<|im_end|>"
    assert (tokenizer.eos_token, model.config.eos_token_id) == ("<|endoftext|>", before), "the run's own stay"
    assert "eos_token_id=tokenizer.eos_token_id" in card_of(tmp_path)
    assert "eos_token_id" not in card_of(tmp_path, kind="full")


def test_fp32_masters_are_stored_in_bf16(tmp_path, tokenizer):
    model = base_model()
    masters = {name: tensor.float() + 1e-3 for name, tensor in model.state_dict().items()}
    write_full_model(tmp_path / "model", model, masters, tokenizer, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, masters[name].bfloat16()), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.config.dtype != torch.bfloat16  # the model in memory is as it was


def test_a_model_with_a_missing_tensor_is_refused(tmp_path, tokenizer):
    model = base_model()
    tensors = dict(model.state_dict())
    del tensors["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"export of the model: 1 tensors are missing \(lm_head\.weight\)"):
        write_full_model(tmp_path / "model", model, tensors, tokenizer)


# The card ------------------------------------------------------------------------------------------------------------

SECRETS = ["hf_abcdefghijklmnopqrstuvwx", "hunter2", "sk-proj-0123456789abcdefghij", "letmein"]


def card_of(folder: Path, **changes) -> str:
    config = DPOConfig(
        model=ModelConfig(path="/home/someone/models/Qwen2.5-7B-Instruct", adapter="~/runs/sft/adapter"),
        data=DataConfig(
            train=["/home/someone/my data/rows.jsonl", {"/srv/b.jsonl": 0.5}], system="Use /home/someone/x."
        ),
        run=RunConfig(name="dpo-run", dir="../../someone/runs"),
    )
    section = {"hub_token": SECRETS[0], "password": SECRETS[1], "url": f"https://me:{SECRETS[3]}@host.example/x"}
    arguments = {
        "kind": "adapter",
        "method": "DPO",
        "base_name": "Qwen/Qwen2.5-7B-Instruct",
        "config": {**as_dict(config), "extra": section},
        "facts": {
            "steps": 100,
            "started with": f"KEY={SECRETS[2]} python /home/someone/x.py",
            "log": "file:///srv/log",
        },
        "metrics": {"eval/rewards/accuracies": 0.953125, "eval/loss": None},
        "datasets": ["/home/someone/my data/rows.jsonl", "org/pairs-v1.5"],
        "lora": {"r": 64, "use_dora": False},
        "name": "dpo-run",
    }
    return model_card(folder, **{**arguments, **changes})


def test_a_card_gives_no_path_and_no_secret_away(tmp_path):
    text = card_of(tmp_path / "adapter")
    for secret in (*SECRETS, "someone", "/home", "/srv", os.fspath(tmp_path), "my data"):
        assert secret not in text, secret
    assert "Qwen2.5-7B-Instruct" in text and "rows.jsonl" in text and "b.jsonl" in text
    assert "tokens_per_microbatch: auto" in text and "control_tokens: escape" in text  # names that are no secrets
    assert "https://" in text and "host.example/x" in text


def test_front_matter_is_what_the_hub_reads(tmp_path):
    write_model_card(
        tmp_path, kind="adapter", method="SFT", base_name="Qwen/Qwen2.5-0.5B", config={}, facts={}, metrics={},
        datasets=["org/chat", "mine.jsonl"], lora={"r": 8}, name="sft-run",
    )  # fmt: skip
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["qwen_train", "sft", "lora", "base_model:adapter:Qwen/Qwen2.5-0.5B"],
        "datasets": ["org/chat"],
    }  # no licence: that is for the publisher to say
    data = yaml.safe_load(card_of(tmp_path, kind="full").split("---")[1])
    assert (data["library_name"], data["base_model_relation"]) == ("transformers", "finetune")
    assert data["datasets"] == ["org/pairs-v1.5"]


def test_a_cards_metrics_are_numbers(tmp_path):
    """Though `token` in a name is a secret's elsewhere."""
    values = {"eval/mean_token_accuracy": 0.5, "eval/logps/chosen_per_token": -1.25, "eval/loss": None}
    lines = card_of(tmp_path, metrics=values, facts={"api token": "x"}).splitlines()
    table = {"mean_token_accuracy | 0.5", "logps/chosen_per_token | -1.25", "loss | -"}
    assert {f"| eval/{row} |" for row in table} <= {*lines} and "| api token | (redacted) |" in lines


@pytest.mark.parametrize(("r", "allowed"), [(64, 64), (8, 8), (96, 128), (4, 8), (257, 320)])
def test_the_serving_command_names_a_rank_that_vllm_takes(tmp_path, r, allowed):
    text = card_of(tmp_path, lora={"r": r, "use_dora": False}, weights="adapter")
    command = (
        f"vllm serve Qwen/Qwen2.5-7B-Instruct --tokenizer adapter --enable-lora --max-lora-rank {allowed} "
        "--lora-modules dpo-run=adapter"
    )
    assert command in text.splitlines()
    assert (f"rank is {r}" in text) == (r != allowed)


def test_what_vllm_cannot_serve_is_said(tmp_path):
    assert "merge" in card_of(tmp_path, lora={"r": 8, "use_dora": True}).split("vLLM")[2]
    assert "vllm serve Q" not in card_of(tmp_path, lora={"r": 1024, "use_dora": False})
    assert "vllm serve . --served-model-name dpo-run" in card_of(tmp_path, kind="merged", lora=None)


@pytest.mark.parametrize("place", ["adapter", "."])
def test_the_snippet_of_the_card_runs(tmp_path, tokenizer, monkeypatch, capsys, place):
    """In the folder of the card, beside the weights or above them, with the run's own base."""
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base)
    card = tmp_path / place
    text = card_of(card, base_name=str(tmp_path / "base"), weights=os.path.relpath(tmp_path / "adapter", card))
    write_adapter(tmp_path / "adapter", model, None, tokenizer, str(tmp_path / "base"), OF_BASE, card=text)
    assert ("../base" if place == "adapter" else "base") in text and os.fspath(tmp_path) not in text
    [snippet] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(card)
    scope: dict = {}
    exec(snippet.replace("max_new_tokens=256", "max_new_tokens=2, do_sample=False"), scope)
    assert torch.equal(logits(scope["model"]), logits(model))
    assert scope["answer"].shape[1] > scope["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out


def test_a_path_is_named_from_the_working_directory(tmp_path, monkeypatch):
    """Elsewhere a run's folder is named with its run, anything else by its last part."""
    for folder in ("here/runs/sft/base", "here/runs/dpo/adapter", "else/runs/sft/adapter", "else/models/qwen"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "else/runs/sft/run_id").write_text("1")
    monkeypatch.chdir(tmp_path / "here")
    named = {
        "runs/sft/base": "runs/sft/base",
        str(tmp_path / "here/runs/sft/base"): "runs/sft/base",
        str(tmp_path / "else/runs/sft/adapter"): "sft/adapter",
        "../else/runs/sft/adapter": "sft/adapter",
        str(tmp_path / "else/models/qwen"): "qwen",
        "Qwen/Qwen2.5-7B": "Qwen/Qwen2.5-7B",
    }
    assert {name: shown_path(name) for name in named} == named
    text = card_of(Path("runs/dpo/adapter"), base_name="runs/sft/base")
    assert "base_model: runs/sft/base\n" in text and 'from_pretrained("../../sft/base"' in text
    text = card_of(Path("runs/dpo/adapter"), base_name=str(tmp_path / "else/models/qwen"))
    assert "base_model: qwen\n" in text and 'from_pretrained("qwen"' in text
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "here/runs/sft")  # the working directory is above a home
    assert shown_path("runs/sft/base") == "base"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/a b/c.jsonl", "c.jsonl"),
        ("~/x/y", "y"),
        ("../../me/z", "z"),
        ("C:\\Users\\me\\m.json", "m.json"),
        ("runs/sft/adapter", "runs/sft/adapter"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("and/or, either / or", "and/or, either / or"),
        ("https://huggingface.co/Qwen/Qwen2.5", "https://huggingface.co/Qwen/Qwen2.5"),
        ("see (/opt/me/x) and path:/opt/me/y", "see (x) and path:y"),
        ("file:///opt/me/x", "x"),
        ("github_pat_11ABCDEFG0123456789", "(redacted)"),
        (0.1, 0.1),
        (None, None),
        (("a", Path("/opt/me")), ["a", "me"]),
    ],
)
def test_what_is_published_of_a_value(value, shown):
    assert redacted(value) == shown


@pytest.mark.parametrize(
    "name", ["hub_token", "HF-TOKEN", "api_key", "apikey", "key", "client_secret", "passwd", "auth"]
)
def test_fields_with_a_secrets_name_are_masked(name):
    assert redacted({"a": {name: "x"}}) == {"a": {name: "(redacted)"}}
    assert redacted({name: None}) == {name: None}


@pytest.mark.parametrize(
    "name",
    [
        "eval/logps/chosen_per_token",
        "eval/mean_token_accuracy",
        "tokens_per_microbatch",
        "control_tokens",
        "num_tokens",
        "keep",
        "monkey",
        "author",
    ],
)
def test_fields_with_a_harmless_name_are_not(name):
    assert redacted({name: 7}) == {name: 7}
