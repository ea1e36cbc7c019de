"""launch/plan.py: every shipped config planned, the README's table, the family's shapes, exit codes, real steps."""

import importlib.util
import io
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_train.command_line import load_config
from qwen_train.config import DPOConfig, ModelConfig, SFTConfig
from qwen_train.model.memory import CARDS, GIB, Shape
from qwen_train.model.shapes import QWEN3, QWEN25, known_shape, shape_of
from qwen_train.output.plan_view import (
    FIELDS,
    describe,
    longest_row,
    markdown_table,
    plan,
    print_measured,
    print_plan,
    shipped_configs,
)
from qwen_train.train.measure import Measured
from tests.scripts import ROOT, TINY, ScriptRunner
from tests.support import SHARED, needs_shared

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COUNTS = {"One": 1, "Two": 2, "Four": 4, "Eight": 8}


@cache
def read(path: Path) -> tuple[str, SFTConfig, Any]:
    config, warnings = load_config(DPOConfig if path.stem.startswith("dpo") else SFTConfig, ["--config", str(path)])
    assert warnings == []
    return path.name, config, shape_of(config.model)


# --- shipped configs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_fit_where_they_say(path: Path):
    """The first lines name the cards: there the plan fits, and on half of the memory it is never refused in vain."""
    _, config, shape = read(path)
    head = path.read_text().split("model:")[0]
    (count, gigabytes), *_ = re.findall(r"(One|Two|Four|Eight) GPUs? of (\d+) GB", head)
    free = 0.98 * int(gigabytes)
    layouts = plan(config, shape, {"card": free}, COUNTS[count])
    assert any(layout.fits for layout in layouts), [layout.candidate.estimate.total / GIB for layout in layouts]
    named = re.findall(r"configs/accelerate/(\w+\.yaml)", head)
    assert any(layout.fits and layout.accelerate in named for layout in layouts)
    assert not any(layout.fits for layout in plan(config, shape, {"card": 2.0}, COUNTS[count]))
    assert f"configs/{path.name}" in head and config.run.name is not None
    # Nor do they ask for more than the README's table does.
    for card in (24, 80):
        (alone,) = plan(config, shape, {"card": CARDS[f"{card} GB"]})
        assert not alone.fits or (count == "One" and int(gigabytes) <= card), f"fits one card of {card} GB"


def test_names_say_size_and_mode():
    for path in CONFIGS:
        task, model, size, mode = path.stem.split("_")
        name, config, _ = read(path)
        assert (task, model) in (("sft", "qwen2.5"), ("dpo", "qwen2.5")), name
        assert config.model.path == f"Qwen/Qwen2.5-{size.upper()}-Instruct"
        found = "full" if not config.lora.enabled else {"none": "lora", "nf4": "qlora"}[config.model.quantization]
        assert mode == found and config.run.name == f"{task}-{size}-{mode}"
    sizes = {path.stem.split("_")[2] for path in CONFIGS}
    assert sizes == {name.split("-")[1].lower() for name in QWEN25}


def test_the_table_of_the_readme_is_the_plan():
    readme = (ROOT / "README.md").read_text()
    table = markdown_table(shipped_configs())
    assert table in readme, f"run: python launch/plan.py --table\n{table}"
    assert table.count("\n") == len(CONFIGS) + 1
    assert table.replace("21.5", "21.4", 1) not in readme


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "without_embeddings"),
    [
        # "Number of Parameters" and "(Non-Embedding)" of the model cards; Qwen2.5-72B's say 70.0 for 70.2
        ("Qwen2.5-0.5B", 0.49, 0.36), ("Qwen2.5-1.5B", 1.54, 1.31), ("Qwen2.5-3B", 3.09, 2.77),
        ("Qwen2.5-7B", 7.61, 6.53), ("Qwen2.5-14B", 14.7, 13.1), ("Qwen2.5-32B", 32.5, 31.0),
        ("Qwen2.5-72B", 72.7, 70.0), ("Qwen3-0.6B", 0.6, 0.44), ("Qwen3-1.7B", 1.7, 1.4), ("Qwen3-4B", 4.0, 3.6),
        ("Qwen3-8B", 8.2, 6.95), ("Qwen3-14B", 14.8, 13.2), ("Qwen3-32B", 32.8, 31.2),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_model_cards(name: str, billions: float, without_embeddings: float):
    shape = Shape.of(known_shape(f"Qwen/{name}-Instruct" if "2.5" in name else f"Qwen/{name}"))
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.015)
    assert shape.layers * shape.layer / 1e9 == pytest.approx(without_embeddings, rel=0.015)


def test_every_size_is_held_against_its_card():
    marks = test_parameters_are_those_of_the_model_cards.pytestmark[0].args[1]
    assert {row[0] for row in marks} == set(QWEN25 | QWEN3)


@needs_shared
def test_the_7b_is_that_of_the_hub():
    stored = json.loads((SHARED / "qwen2.5-tokenizer" / "config-7b.json").read_text())
    known = known_shape("Qwen/Qwen2.5-7B-Instruct").to_dict()
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings"):
        assert known[name] == stored[name]
    assert (known["num_attention_heads"], known["num_key_value_heads"]) == (28, 4)


def test_a_folder_goes_by_its_own_config_and_an_unknown_model_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    assert shape_of(ModelConfig(path=str(TINY / "model"))).hidden_size == 256
    assert known_shape("Qwen/Qwen2.5-Coder-7B") is None and known_shape("meta/Llama") is None

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    assert shape_of(ModelConfig(path="Qwen/Qwen2.5-14B-Instruct")).hidden_size == 5120
    with pytest.raises(ValueError, match="the hub could not be reached"):
        shape_of(ModelConfig(path="someone/Qwen2.5-9B"))


# --- layouts ----------------------------------------------------------------------------------------------------------


def layouts(name: str, gpus: int, shards: int | None = None) -> list[tuple[str, int]]:
    _, config, shape = read(ROOT / "configs" / f"{name}.yaml")
    return [(layout.accelerate, layout.shards) for layout in plan(config, shape, {"card": 79.0}, gpus, shards)]


def test_the_ways_to_spread_a_config():
    assert layouts("sft_qwen2.5_7b_lora", 1) == [("single.yaml", 1)]
    assert layouts("sft_qwen2.5_7b_lora", 8) == [("ddp.yaml", 1), ("fsdp2.yaml", 8)]
    assert layouts("sft_qwen2.5_7b_full", 16, shards=8) == [("fsdp2_hsdp.yaml", 8)]
    assert layouts("sft_qwen2.5_7b_qlora", 8) == [("ddp.yaml", 1)], "NF4 is not sharded"


def test_the_longest_row_of_pairs_holds_both_answers():
    _, sft, _ = read(ROOT / "configs/sft_qwen2.5_7b_lora.yaml")
    _, dpo, _ = read(ROOT / "configs/dpo_qwen2.5_7b_lora.yaml")
    assert (longest_row(sft), longest_row(dpo)) == (4096, 2 * 2048)


@pytest.mark.parametrize(("gpus", "said"), [(32, ""), (40, "a step of 32 leaves 8 of 40 GPUs without work")])
def test_more_gpus_than_rows(gpus: int, said: str, capsys: pytest.CaptureFixture[str]):
    script().main([*FULL.split("="), "--memory", "79", "--gpus", str(gpus)])
    found = capsys.readouterr().err
    assert said in found and bool(found) == bool(said)


# --- the script -------------------------------------------------------------------------------------------------------


FULL = f"--config={ROOT}/configs/sft_qwen2.5_7b_full.yaml"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("plan_script", ROOT / "launch" / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([FULL, "--memory", "139"], 0),
        ([FULL, "--memory", "79"], 1),
        ([FULL, "--memory", "79", "--gpus", "8"], 0),
        ([FULL, "--memory", "40", "--gpus", "16", "--shards", "8"], 0),
        ([FULL, "--memory", "79", "--lora.enabled", "true"], 0),
        ([FULL, "--memory", "79", "--batch.tokens_per_microbatch", "4096", "--model.checkpoint_layers", "0"], 1),
    ],
)
def test_exit_codes(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]):
    arguments = [word for argument in arguments for word in argument.split("=", 1)]
    assert script().main(arguments) == code
    shown = capsys.readouterr().out
    assert "7.62 B parameters" in shown and "together" in shown
    assert ("DOES NOT FIT" in shown) >= (code == 1)


def test_what_the_config_says_without_effect_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As the training does; under a launcher by one process."""
    path = tmp_path / "full.yaml"
    model = {"path": str(TINY / "model"), "from_scratch": True}
    path.write_text(yaml.safe_dump({"model": model, "data": {"train": "x"}, "lora": {"enabled": False, "r": 8}}))
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert script().main(["--config", str(path), "--memory", "79"]) == 0
        assert capsys.readouterr().err.count("warning: lora.r: has no effect, since") == times


def test_the_plan_as_json(capsys: pytest.CaptureFixture[str]):
    assert script().main([*FULL.split("="), "--gpus", "8", "--memory", "79", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    whole, sharded = json.loads(line)["layouts"]
    assert (whole["fits"], sharded["fits"], sharded["accelerate"]) == (False, True, "fsdp2.yaml")
    parts = [name for name in whole if name.endswith("_bytes") and name != "total_bytes"]
    assert sum(whole[name] for name in parts) == whole["total_bytes"]


def test_a_continued_adapter_counts_with_its_own_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY / "model")).save_pretrained(base)
    settings = LoraConfig(r=24, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(adapter)
    start = ["--model.from_scratch", "false", "--model.path", base, "--model.adapter", adapter]
    shape = Shape.of(shape_of(ModelConfig(path=base)))
    for how, rank in (("continue", 24), ("merge", 16)):
        more = [] if how == "continue" else ["--lora.r", "16"]
        script().main([*start, "--model.adapter_start", how, *more, "--memory", "79", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert f"SFT of LoRA r {rank}," in found["plan"]
        assert found["layouts"][0]["optimizer_bytes"] == 8 * shape.adapter(rank, "all-linear")
        assert found["layouts"][0]["adapters_bytes"] == 4 * shape.adapter(rank, "all-linear")


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("gpus", [1, 8])
def test_nothing_is_cut_on_a_narrow_terminal(width: int, gpus: int):
    """Every name that one has to copy, and every number, in as many tables as it takes."""
    _, config, shape = read(ROOT / "configs/sft_qwen2.5_7b_lora.yaml")
    made = plan(config, shape, CARDS | {"NVIDIA RTX PRO 6000 Blackwell Server Edition": 94.0}, gpus)
    out = io.StringIO()
    print_plan(made, "plan", Console(width=width, file=out))
    text = out.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    tables = text.split("GiB a GPU")[1:]
    assert all(field in table for table in tables for field in FIELDS)
    assert (len(tables) == 1) == (width == 200)
    found = [row.split()[1:] for row in text.splitlines() if row.startswith(FIELDS[0])]
    assert [number for row in found for number in row] == [f"{one.candidate.tokens:,}" for one in made]
    assert sum(text.count(name) for name in ("ddp.yaml", "fsdp2.yaml", "single.yaml")) == len(made)


@pytest.mark.launch
def test_help_does_not_wait_for_transformers(tmp_path: Path):
    code = f"import runpy, sys; sys.argv = ['plan.py', '--help']; runpy.run_path({str(ROOT / 'launch/plan.py')!r}, "
    code += "run_name='__main__')"
    names = "print('loaded', [name for name in ('transformers', 'peft', 'accelerate') if name in sys.modules])"
    script = f"import atexit, sys\natexit.register(lambda: {names})\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--gpus N" in done.stdout and done.stdout.endswith("loaded []\n")


def test_an_adapter_that_does_not_exist_yet(capsys: pytest.CaptureFixture[str]):
    """Before the SFT run that makes it, the plan goes by the config, and says so."""
    start = ["--model.from_scratch", "false", "--model.adapter", "runs/none", "--model.adapter_start", "continue"]
    script().main([*start, "--memory", "79", "--json"])
    found = capsys.readouterr()
    assert "SFT of LoRA r 64," in json.loads(found.out)["plan"]
    assert found.err.startswith("model.adapter: runs/none is not there: planned with lora.r 64")


def test_without_a_gpu_the_usual_cards_are_planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert script().main(FULL.split("=")) == 0
    shown = capsys.readouterr().out
    assert all(card in shown for card in CARDS)
    assert shown.count("DOES NOT FIT") == 3, "all but the largest"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus: must be a number > 0, got 0"),
        (["--memory", "-3"], "--memory: must be a number > 0, got -3.0"),
        (["--memory", "nan"], "--memory: must be a number > 0, got nan"),
        (["--memory", "inf"], "--memory: must be a number > 0, got inf"),
        (["--measure", "--gpus", "8"], "--measure: takes the GPUs that there are"),
        (["--measure", "--memory", "79"], "--measure: takes the GPUs that there are"),
        (
            ["--gpus", "8", "--shards", "4", "--model.quantization", "nf4", "--model.dtype", "bfloat16"],
            "model.quantization: nf4 weights cannot be sharded",
        ),
        (["--steps", "3"], "--steps: counts measured steps, got no --measure; add it, or leave --steps out"),
        (["--table", "--gpus", "8", "--json"], "of all shipped configs on the usual cards; leave out --gpus, --json"),
        (["--table", "--lora.r=8"], "--table: is of all shipped configs on the usual cards; leave out --lora.r=8"),
        (["--table", "--config", "x.yaml"], "leave out --config"),
        (["--gpus", "8", "--shards", "3"], "--shards: must divide --gpus 8 and be more than 1, got 3"),
        (["--config", "none.yaml"], "none.yaml does not exist"),
        (["--optim.speed", "3"], "optim.speed: no such field"),
        (["--lora.target_modules", "("], "lora.target_modules: ( is no pattern"),
        (["--lora.target_modules", "[foo]"], "lora.target_modules: none of the model's linear layers is meant by"),
    ],
)
def test_mistakes(arguments: list[str], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        script().main(arguments)


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_real_steps(ranks: int, tmp_path: Path, scripts: ScriptRunner):
    arguments = ["--measure", "--json", "--steps", "1", "--batch.tokens_per_microbatch", "300", "--lora.r", "4"]
    result = scripts.run(tmp_path / "out.txt", "launch/plan.py", *arguments, ranks=ranks)
    assert result.code == 0, result.output
    (warning,) = (line for line in result.lines if line.startswith("warning:") and "--measure" in line)
    assert "no CUDA device is seen: this measures the CPU" in warning  # once, not by every rank
    measured = json.loads(next(line for line in result.lines if line.startswith("{")))["measured"]
    assert measured["world_size"] == ranks and measured["tokens_per_microbatch"] == 300
    assert measured["tokens_per_second"] == pytest.approx(2 * ranks * 300 / measured["step_seconds"], rel=0.02)


@pytest.mark.parametrize(
    ("device", "ranks", "words"),
    [
        ("cuda", 2, ["measured on 2 processes,", "peak 0.6 GiB, estimated 0.1"]),
        ("cpu", 1, ["measured on 1 process,", "peak 0.6 GiB, resident memory of the process"]),
    ],
)
def test_what_was_measured_in_words(device: str, ranks: int, words: list[str]):
    """An estimate of a GPU's memory does not stand beside what the whole process takes."""
    console = Console(file=io.StringIO(), width=200)
    print_measured(Measured(device, ranks, 300, 0, 0.1, 0.6, 6570.0, None, 0.0, 0.6, 1.0, 0), console)
    shown = console.file.getvalue()
    assert all(word in shown for word in words) and ("estimated" in shown) == (device == "cuda")


def test_small_models_are_counted_in_millions():
    config, _ = load_config(SFTConfig, [])
    assert f"{config.model.path}: 1.0 M parameters, 2 layers" in describe(config, shape_of(config.model))


@pytest.mark.launch
def test_steps_that_end_early_are_one_line(tmp_path: Path, scripts: ScriptRunner):
    """Memory that runs out with numbers that are given, and Ctrl-C."""
    prelude = "import os, signal, torch\nfrom qwen_train.train.distributed import Run\ndef backward(run, loss):\n    "
    arguments = ["launch/plan.py", "--measure", "--steps", "1", "--batch.tokens_per_microbatch", "300"]
    for act, code, message in (
        ("raise torch.OutOfMemoryError('planted')", 1, "error: does not fit: out of memory (planted)"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "error: stopped before the first step"),
    ):
        result = scripts.run(tmp_path / "out.txt", *arguments, prelude=f"{prelude}{act}\nRun.backward = backward\n")
        assert (result.code, result.lines[-1]) == (code, message), result.output


@pytest.mark.launch
def test_what_cannot_be_used_is_one_line(tmp_path: Path, scripts: ScriptRunner):
    given = yaml.safe_load((TINY / "sft.yaml").read_text())
    given["model"]["path"] = str(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given))
    result = scripts.run(tmp_path / "out.txt", "launch/plan.py", "--config", str(tmp_path / "mine.yaml"))
    assert result.code == 2
    (line,) = result.lines
    assert line.startswith(f"error: model.path: no model config in {tmp_path}")
