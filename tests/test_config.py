"""The config: every shipped file loads, every mistake is one line, every field does something."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qwen_train import config as config_module
from qwen_train import dpo, sft
from qwen_train.command_line import EMBEDDED, TIMED_NAME, load_config, load_for_tool, tool_parser
from qwen_train.config import DPOConfig, SFTConfig, as_dict, field_types, to_yaml
from qwen_train.config_errors import OF_OTHER_TRAINERS
from qwen_train.data import stream
from qwen_train.data.chat import ChatOptions
from qwen_train.data.tokenize import tokenize
from qwen_train.loss.preference import LOSSES, LossConfig, Pairs, preference_loss
from qwen_train.model import compile, load, logprobs
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.model.memory import with_candidate
from qwen_train.model.packed import trainable_parameters
from qwen_train.train.distributed import Run
from qwen_train.train.guard import judge
from qwen_train.train.optim import build_optimizer
from qwen_train.train.progress import Progress
from tests.scripts import ROOT, TINY, read_metrics

CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "accelerate"]


def class_of(path: Path) -> type[SFTConfig]:
    return DPOConfig if "dpo" in path.name else SFTConfig


def field_names(config_class: type[SFTConfig]) -> list[str]:
    sections = {section.name: section.default_factory for section in dataclasses.fields(config_class)}
    return [f"{name}.{field.name}" for name, kind in sections.items() for field in dataclasses.fields(kind)]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path):
    """Without a warning: no stale field, none without effect."""
    config, warnings = load_config(class_of(path), ["--config", str(path)])
    assert warnings == []
    given = yaml.safe_load(path.read_text())
    resolved = as_dict(config)
    for section, fields in given.items():
        for name, value in fields.items():
            assert resolved[section][name] == value, f"{section}.{name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_shipped_field_can_be_stale(path: Path, tmp_path: Path):
    """Each field of each file, renamed as a refactor would have left it, is refused by name."""
    given = yaml.safe_load(path.read_text())
    for section, fields in given.items():
        for name in fields:
            stale = given | {section: {(f"{key}_old" if key == name else key): fields[key] for key in fields}}
            (tmp_path / "stale.yaml").write_text(yaml.safe_dump(stale))
            with pytest.raises(ValueError, match=f"^{section}.{name}_old: no such field in .*stale.yaml; did you mean"):
                load_config(class_of(path), ["--config", str(tmp_path / "stale.yaml")])


def test_shipped_values():
    """What DESIGN section 4 promises of the 7B files."""
    by_name = {path.stem: load_config(class_of(path), ["--config", str(path)])[0] for path in CONFIGS}
    for kind in ("lora", "qlora", "full"):
        config = by_name[f"sft_qwen2.5_7b_{kind}"]
        assert (config.optim.lr, config.optim.schedule, config.data.max_length) == (2e-5, "cosine", 4096)
        assert config.model.quantization == ("nf4" if kind == "qlora" else "none")
        assert config.lora.enabled == (kind != "full")
        assert config.model.path == "Qwen/Qwen2.5-7B-Instruct" and config.model.dtype == "bfloat16"
        assert config.data.train == "data/train.jsonl"
    lora = by_name["sft_qwen2.5_7b_lora"].lora
    assert (lora.r, lora.scale_numerator, lora.target_modules) == (64, 128, "all-linear")


SCRIPT = """
import runpy, sys
sys.argv = [sys.argv[1], "--optim.lr=-1"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as leaving:
    print(leaving.code, *sorted({"transformers", "accelerate", "peft", "datasets"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("script", ["launch/sft.py", "launch/dpo.py"])
def test_mistakes_do_not_wait_for_imports(script: str):
    """transformers and PEFT take five seconds; a typo is told at once."""
    command = [sys.executable, "-c", SCRIPT, str(ROOT / script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2\n" and done.stderr.startswith("error: optim.lr: must be > 0, got -1.0"), done.stderr


def test_own_rows_on_the_embedded_default_are_not_judged_by_its_questions():
    config, notes = load_config(SFTConfig, ["--data.train=mine.jsonl"])
    assert config.data.eval is None and config.model.from_scratch
    assert [note.split(":")[0] for note in notes] == ["no --config", "data.eval"] and "--data.eval FILE" in notes[1]
    config, notes = load_config(SFTConfig, ["--data.train=mine.jsonl", "--data.eval=held.jsonl"])
    assert config.data.eval == "held.jsonl" and config.run.eval_every == load_config(SFTConfig, [])[0].run.eval_every
    assert len(notes) == 1 and load_config(SFTConfig, [])[1] == []
    config, _ = load_config(DPOConfig, ["--data.train=mine.jsonl", "--data.eval=held.jsonl"])
    assert config.data.eval == "held.jsonl" and config.data.eval_sft is None


@pytest.mark.parametrize("config_class", [SFTConfig, DPOConfig])
def test_own_rows_without_a_config_are_told_what_they_train(
    config_class: type[SFTConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # no run of the demo is here

    def told(*argv: str) -> list[str]:
        return [note for note in load_config(config_class, argv)[1] if note.startswith("no --config")]

    (note,) = told("--data.train=mine.jsonl")
    named = re.search(r"configs/\S+", note)
    assert "the demo's tiny random model" in note and named is not None
    assert class_of(Path(named[0])) is config_class and (ROOT / named[0]).exists()
    assert told("--data.eval=held.jsonl") == [note]
    assert "random" not in told("--data.train=mine.jsonl", "--model.path=mine")[0]
    assert told() == told("--optim.lr=1e-3") == told("--data.train=a.jsonl", f"--config={EMBEDDED[config_class]}") == []


def test_7b_inherits_nothing_from_tiny(tmp_path: Path):
    """Every field that a file leaves out has the dataclass's own default, whatever the embedded file says."""
    tiny = yaml.safe_load((TINY / "sft.yaml").read_text())
    defaults = as_dict(SFTConfig(data=config_module.DataConfig(train="x")))
    path = ROOT / "configs/sft_qwen2.5_7b_lora.yaml"
    config, _ = load_config(SFTConfig, ["--config", str(path)])
    given = yaml.safe_load(path.read_text())
    differing = 0
    for section, fields in as_dict(config).items():
        for name, value in fields.items():
            if (section, name) != ("run", "name") and name not in given.get(section, {}):
                assert value == defaults[section][name], f"{section}.{name}"
                differing += tiny.get(section, {}).get(name, value) != value
    assert differing >= 10  # the tiny file would have shown
    embedded, _ = load_config(SFTConfig, [])
    assert embedded.model.from_scratch and embedded.run.name == "tiny-sft"


def test_config_of_a_run_is_read_back(tmp_path: Path):
    """`to_yaml` and `--print_config` give files that mean the same, without a warning for what they merely list."""
    config, _ = load_config(SFTConfig, ["--data.train=[a.jsonl, {b.jsonl: 0.5}]", "--optim.lr=3e-4", "--run.steps=7"])
    (tmp_path / "whole.yaml").write_text(to_yaml(config))
    assert load_config(SFTConfig, ["--config", str(tmp_path / "whole.yaml")]) == (config, [])

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as leaving:
        load_config(SFTConfig, ["--optim.lr=3e-4", "--run.steps=7", "--print_config"])
    assert leaving.value.code == 0
    (tmp_path / "printed.yaml").write_text(printed.getvalue())
    again, warnings = load_config(SFTConfig, ["--config", str(tmp_path / "printed.yaml")])
    assert warnings == [] and (again.optim.lr, again.run.steps, again.run.name) == (3e-4, 7, "tiny-sft")


def printed(config_class: type[SFTConfig], capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[Any, str]:
    """What `--print_config` prints, as values, and what it says beside it."""
    with pytest.raises(SystemExit) as leaving:
        load_config(config_class, [*argv, "--print_config"])
    assert leaving.value.code == 0
    said = capsys.readouterr()
    return yaml.safe_load(said.out), said.err


@pytest.mark.parametrize("config_class", [SFTConfig, DPOConfig])
@pytest.mark.parametrize("argv", [[], ["--data.train=my.jsonl"], ["--data.train=my.jsonl", "--data.eval=held.jsonl"]])
def test_what_is_printed_is_what_would_be_trained(
    config_class: type[SFTConfig],
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The embedded default's evaluation was printed beside own rows, and paths that are not where one stands."""
    monkeypatch.chdir(tmp_path)
    config, warnings = load_config(config_class, argv)
    values, said = printed(config_class, capsys, *argv)
    assert values == as_dict(config) and said == "".join(f"warning: {line}\n" for line in warnings)
    assert values["data"]["eval"] == {0: str(TINY / f"{values['run']['name'][5:]}_eval.jsonl"), 1: None}.get(
        len(argv), "held.jsonl"
    )
    with pytest.raises(ValueError, match=r"^model\.adapter_start: has no effect"):
        load_config(config_class, ["--print_config", "--model.adapter_start=merge", *argv, "--model.adapter=null"])


def test_a_made_up_name_is_not_printed(capsys: pytest.CaptureFixture[str]):
    """Whoever saved it as a config would go on with one run for ever."""
    values, _ = printed(SFTConfig, capsys, "--run.name=null")
    assert values["run"]["name"] is None and load_config(SFTConfig, ["--run.name=null"])[0].run.name is not None
    with pytest.raises(ValueError, match=r"^--print_config: takes no value$"):
        load_config(SFTConfig, ["--print_config=skip_null"])


def test_a_run_without_a_name_gets_one_that_can_be_told(tmp_path: Path):
    """The config's stem and the time; the names that the shipped configs give are none of that kind."""
    (tmp_path / "mine.yaml").write_text("data: {train: a.jsonl}\n")
    config, _ = load_config(SFTConfig, ["--config", str(tmp_path / "mine.yaml")])
    assert config.run.name is not None and config.run.name.startswith("mine-")
    assert TIMED_NAME.fullmatch(config.run.name)
    for path in CONFIGS:
        shipped, _ = load_config(DPOConfig if path.name.startswith("dpo") else SFTConfig, ["--config", str(path)])
        assert shipped.run.name is not None and not TIMED_NAME.fullmatch(shipped.run.name), path


def test_later_files_and_the_command_line_win(tmp_path: Path):
    (tmp_path / "more.yaml").write_text("optim: {lr: 1.0e-4}\nrun: {epochs: 2}\n")
    files = ["--config", str(ROOT / "configs/sft_qwen2.5_7b_lora.yaml"), "--config", str(tmp_path / "more.yaml")]
    config, _ = load_config(SFTConfig, files)
    assert (config.optim.lr, config.run.epochs, config.lora.r) == (1e-4, 2, 64)
    assert config.run.name == "sft-7b-lora"
    config, _ = load_config(SFTConfig, [*files, "--optim.lr", "5e-5", "--run.steps=3"])
    assert (config.optim.lr, config.run.epochs, config.run.steps) == (5e-5, None, 3)


@pytest.mark.parametrize(
    "null", [["--run.epochs", "null"], ["--run.epochs=~"], ["--run.epochs=2", "--run.epochs=null"]]
)
def test_null_does_not_replace_the_length_that_a_file_gives(null: list[str], tmp_path: Path):
    (tmp_path / "more.yaml").write_text("run: {epochs: 2}\n")
    config, _ = load_config(SFTConfig, ["--config", str(TINY / "sft.yaml"), *null])
    assert config.run.steps == yaml.safe_load((TINY / "sft.yaml").read_text())["run"]["steps"]
    assert config.run.epochs is None
    swapped = [word.replace("epochs", "steps") for word in null]
    files = ["--config", str(ROOT / "configs/sft_qwen2.5_7b_lora.yaml"), "--config", str(tmp_path / "more.yaml")]
    assert load_config(SFTConfig, [*files, *swapped])[0].run.epochs == 2


def test_the_command_line_wins_wherever_it_stands(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("data: {train: a.jsonl}\noptim: {lr: 1.0e-3}\nlora: {r: 4}\n")
    (tmp_path / "b.yaml").write_text("optim: {lr: 1.0e-4}\nlora: {r: 8}\nrun: {epochs: 2}\n")
    a, b = (str(tmp_path / name) for name in ("a.yaml", "b.yaml"))
    orders = [
        ["--optim.lr", "5e-5", "--run.steps=3", f"--config={a}", "--config", b],
        ["--optim.lr=5e-5", "--config", a, "--run.steps", "3", f"--config={b}"],
    ]
    for argv in orders:
        config, _ = load_config(SFTConfig, argv)
        assert (config.optim.lr, config.run.steps, config.run.epochs) == (5e-5, 3, None)
        assert config.lora.r == 8 and config.data.train == "a.jsonl"  # the later file over the earlier one
        assert config.run.name is not None and config.run.name.startswith("b-")
    with pytest.raises(ValueError, match="--config"):
        load_config(SFTConfig, ["--optim.lr=5e-5", "--config"])


def test_every_path_has_the_home_that_a_shell_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From YAML and from --field=~/x, which a shell leaves alone; hub ids and other words are as they were."""
    monkeypatch.setenv("HOME", "/home/me")
    given = {
        "model": {"path": "~/base", "adapter": "~/adapter"},
        "data": {"train": ["~/a.jsonl", {"~/b.jsonl:train": 0.5}], "eval": "~/c", "eval_sft": "~/d"},
        "reference": {"source": "model", "path": "~/reference"},
        "run": {"dir": "~/runs", "resume": "~/runs/x/checkpoints/step-000001"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given))
    config, _ = load_config(DPOConfig, ["--config", str(tmp_path / "mine.yaml")])
    found = as_dict(config)
    for section, fields in given.items():
        for name, value in fields.items():
            assert json.dumps(found[section][name]) == json.dumps(value).replace("~", "/home/me"), name
    assert config.data.cache_dir == "/home/me/.cache/qwen_train" == config_module.DataConfig(train="x").cache_dir
    argv = ["--run.dir=~/runs", "--data.train=[~/a.jsonl, {~/b.jsonl: 2}]", "--model.path=Qwen/Qwen2.5-0.5B"]
    config, _ = load_config(SFTConfig, argv)
    assert (config.run.dir, config.run.resume, config.model.path) == ("/home/me/runs", "auto", "Qwen/Qwen2.5-0.5B")
    assert config.data.train == ["/home/me/a.jsonl", {"/home/me/b.jsonl": 2.0}]


def test_a_path_may_hold_a_dollar_where_it_exists(tmp_path: Path):
    odd = tmp_path / "$rows.jsonl"
    odd.touch()
    assert load_config(SFTConfig, [f"--data.train={odd}"])[0].data.train == str(odd)


def test_help_shows_docstrings_and_units():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        load_config(DPOConfig, ["--help"])
    text = " ".join(printed.getvalue().split())
    for name in field_names(DPOConfig):
        assert f"--{name} " in text
    for words in ("Longest sequence (tokens)", "Steps between checkpoints", "Most tokens of one forward on one GPU"):
        assert words in text
    assert "Path to a configuration file" not in text


def test_every_field_has_a_docstring():
    tree = ast.parse(Path(config_module.__file__).read_text())
    for node in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and node.name not in ("SFTConfig", "DPOConfig"):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert is_text, f"{node.name}, line {statement.lineno}"


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("--optim.lr=abc", "optim.lr: expected a number, got 'abc'"),
    ("--optim.lr=nan", "optim.lr: expected a number, got 'nan'"),
    ("--optim.lr=0", "optim.lr: must be > 0, got 0.0; 2e-5 suits LoRA"),
    ("--optim.nme=adamw", "optim.nme: no such field; did you mean optim.name?"),
    ("--optim.l=1", "optim.l: no such field; did you mean optim.lr?"),  # no abbreviations
    ("--learning_rate=1", "learning_rate: no such field; did you mean optim.lr?"),
    ("--optim.learning_rate=1", "optim.learning_rate: no such field; did you mean optim.lr?"),
    ("--num-train-epochs=1", "num-train-epochs: no such field; did you mean run.epochs?"),
    ("--beta=1", "beta: no such field; see --help"),  # of pairs only
    ("--loss.name=ipo", "loss.name: is a field of DPO; give it to launch/dpo.py, or leave it out"),
    ("--nonsense=1", "nonsense: no such field; see --help"),
    ("--optim=3", "optim: is a section; give its fields, as --optim.field value, or a file as --config"),
    (
        "train.jsonl",
        "command line: 'train.jsonl' belongs to no option; fields are given as --section.field value, "
        "several as '[a, b]'",
    ),
    ("my.yaml", "command line: 'my.yaml' belongs to no option; a file is given as --config my.yaml"),
    ("--optim.name=sgd", "optim.name: expected one of adamw, adamw_8bit, got 'sgd'"),
    ("--run.steps=1.5", "run.steps: expected a whole number or null, got '1.5'"),
    ("--run.seed=true", "run.seed: expected a whole number, got 'True'"),
    ("--run.seed=-1", "run.seed: must be in [0, 2^32), got -1; try 42"),
    ("--model.compile=maybe", "model.compile: expected true or false, got 'maybe'"),
    ("--model.checkpoint_layers=x", "model.checkpoint_layers: expected a whole number or auto, got 'x'"),
    ("--model.checkpoint_layers=-1", "model.checkpoint_layers: must be auto or >= 0, got -1; 0: none"),
    ("--model.head_chunk=0", "model.head_chunk: must be > 0 tokens, got 0; try 4096"),
    ("--model.path=", "model.path: must name a hub id or a folder, got nothing; give one"),
    ("--model.dtype=fp16", "model.dtype: expected one of bfloat16, float32, got 'fp16'"),
    ("--model.quantization=nf4", "model.dtype: nf4 computes in bfloat16, got float32; set bfloat16"),
    (
        "--model.quantization=fp8 --model.dtype=bfloat16 --lora.dropout=0.1",
        "model.quantization: fp8 takes plain LoRA only, got lora.dropout 0.1; leave it out, or take nf4 or none",
    ),
    (
        "--model.quantization=fp8 --model.dtype=bfloat16 --lora.use_dora=true",
        "model.quantization: fp8 takes plain LoRA only, got lora.use_dora true; leave it out, or take nf4 or none",
    ),
    ("--optim.betas=[0.9]", "optim.betas: expected 2 values such as [0.9, 0.999], got '[0.9]'"),
    ("--optim.betas=[0.9, 1]", "optim.betas: both must be in [0, 1), got (0.9, 1.0); try [0.9, 0.999]"),
    ("--lora.r=-1", "lora.r: must be > 0, got -1; try 64, or lora.enabled false"),
    ("--lora.dropout=1", "lora.dropout: must be in [0, 1), got 1.0; try 0.05"),
    ("--data.train=", "data.train: no training data named; give a file, folder or hub id"),
    ("--data.train={a: x}", "data.train: expected a path or a list, got {a: x}; write it as [a.jsonl, {b.jsonl: 2}]"),
    ("--data.max_length=1", "data.max_length: must be > 1 token, got 1; try 4096"),
    ("--batch.sequences_per_step=0", "batch.sequences_per_step: must be in [1, 1,000,000], got 0; try 32"),
    ("--batch.sequences_per_step=2000000", "batch.sequences_per_step: must be in [1, 1,000,000], got 2000000; try 32"),
    ("--run.epochs=1 --run.steps=2", "run.steps: got both steps 2 and epochs 1.0; give one of them"),
    ("--run.steps=0", "run.steps: must be in [1, 1,000,000,000], got 0; try 100"),
    (f"--run.steps={10**18}", f"run.steps: must be in [1, 1,000,000,000], got {10**18}; try 100"),
    ("--run.epochs=1e308", "run.epochs: must be in (0, 1,000,000,000], got 1e+308; try 1"),
    ("--run.name=a/b", "run.name: must be a plain folder name, got 'a/b'; use run.dir for the place"),
    ("--run.dir=", "run.dir: must name a folder, got nothing; leave it out for runs"),
    ("--run.dir=$HOME/x", "run.dir: $HOME/x holds a variable, which only a shell expands; give the whole path"),
    ("--data.train=[$X.json]", "data.train: $X.json holds a variable, which only a shell expands; give the whole path"),
    ("--model.path=~absent/x", "model.path: ~absent/x begins with no user's home; give the whole path, or ./~absent/x"),
    ("--run.keep=0", "run.keep: must be > 0 checkpoints, got 0; try 2"),
    ("--run.save_every=-1", "run.save_every: must be >= 0, got -1; 0 turns it off"),
    ("--lora.enabled=false --lora.r=8", "lora.r: has no effect, since lora.enabled is false; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line(words: str, message: str):
    argv = words.split(" --")
    with pytest.raises(ValueError) as error:
        load_config(SFTConfig, [argv[0], *(f"--{word}" for word in argv[1:])])
    assert str(error.value) == message


def test_the_names_of_other_trainers_lead_to_fields_that_exist():
    fields = field_types(DPOConfig)
    assert set(OF_OTHER_TRAINERS.values()) <= set(fields)
    with pytest.raises(ValueError, match=r"^beta: no such field; did you mean loss\.beta\?$"):
        load_config(DPOConfig, ["--beta=1"])


BAD_FILES = [
    ("model: 3\n", "model: must hold fields, got 3 in bad.yaml; write them below it, or leave it out"),
    ("optim:\n", "optim: must hold fields, got None in bad.yaml; write them below it, or leave it out"),
    ("optm: {lr: 1}\n", "optm: no such section in bad.yaml; did you mean optim?"),
    ("learning_rate: 1\n", "learning_rate: no such section in bad.yaml; did you mean optim.lr?"),
    ("lora: {lora_alpha: 1}\n", "lora.lora_alpha: no such field in bad.yaml; did you mean lora.alpha?"),
    ("zzz: {beta: 1}\n", "zzz: no such section in bad.yaml; there are model, lora, data, batch, optim, run"),
    (
        "loss: {beta: 1}\n",
        "loss: bad.yaml is a config of DPO; give it to launch/dpo.py, or take configs/sft_qwen2.5_7b_lora.yaml",
    ),
    (
        "compute_environment: LOCAL_MACHINE\n",
        "--config: bad.yaml is for accelerate: accelerate launch --config_file bad.yaml launch/...",
    ),
    ("optim: {lrr: 1}\n", "optim.lrr: no such field in bad.yaml; did you mean optim.lr?"),
    ("optim: {lr: abc}\n", "optim.lr: expected a number, got 'abc'"),
    ("- a\n", "--config: bad.yaml must hold sections such as `model:`, got list"),
    ("", "--config: bad.yaml must hold sections such as `model:`, got NoneType"),
    ("optim: {lr: 1.0e-3}\noptim: {lr: 2.0e-3}\n", "--config: bad.yaml is not readable YAML: 'optim' is given twice"),
    ("a: [\n", "--config: bad.yaml is not readable YAML: while parsing"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[message for _, message in BAD_FILES])
def test_a_bad_file_is_one_line(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_config(SFTConfig, ["--config", "bad.yaml"])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_told_with_the_folder_it_was_looked_for_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The shipped configs are in the repository, and a relative path is of the folder one stands in."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_config(SFTConfig, ["--config", "configs/sft_qwen2.5_7b_lora.yaml"])
    shipped = f"the shipped ones: {ROOT / 'configs'}"
    assert str(error.value) == f"--config: configs/sft_qwen2.5_7b_lora.yaml does not exist in {tmp_path}; {shipped}"


def test_several_problems_are_several_lines():
    with pytest.raises(ValueError) as error:
        load_config(SFTConfig, ["--run.keep=0", "--run.log_every=0"])
    assert len(str(error.value).splitlines()) == 2


# --- fields without effect --------------------------------------------------------------------------------------------

ADAPTER = ("model.adapter=somewhere", "model.adapter_start=continue")
IDLE = [  # what makes it idle, and the fields with a value
    (SFTConfig, ("lora.enabled=false",), {"lora.r": 8, "lora.alpha": 8.0, "lora.dropout": 0.5, "lora.use_dora": True}),
    (SFTConfig, ("lora.enabled=false",), {"lora.use_rslora": True, "lora.target_modules": "q_proj"}),
    (SFTConfig, ADAPTER, {"lora.r": 8, "lora.dropout": 0.5}),
    (SFTConfig, (), {"model.adapter_start": "continue"}),
    (SFTConfig, (f"model.path={TINY / 'model'}",), {"model.revision": "main"}),
    (SFTConfig, ("optim.schedule=constant",), {"optim.min_lr_ratio": 0.5}),
    (SFTConfig, ("data.eval=null",), {"run.eval_every": 5, "run.eval_samples": 5, "run.eval_sample_tokens": 5}),
    (SFTConfig, ("run.eval_samples=0",), {"run.eval_sample_tokens": 5}),
    (SFTConfig, (), {"data.eval_sft": "x.jsonl"}),
    (DPOConfig, ("data.eval=null",), {"data.eval_sft": "x.jsonl"}),
    (DPOConfig, (), {"data.supervise": "last", "loss.simpo_gamma": 1.0, "loss.ipo_norm": "sum"}),
    (DPOConfig, ("loss.name=hinge",), {"loss.label_smoothing": 0.2}),
    (DPOConfig, (), {"reference.path": "somewhere"}),
    (DPOConfig, ("loss.name=simpo",), {"reference.precompute": True, "reference.source": "adapter_off"}),
]  # fmt: skip


@pytest.mark.parametrize(("config_class", "setting", "fields"), IDLE, ids=lambda value: str(value)[:60])
def test_idle_fields(config_class: type[SFTConfig], setting: tuple[str, ...], fields: dict[str, Any], tmp_path: Path):
    """On the command line an error that names the reason, in a file one warning."""
    stem = config_class.__name__[:3].lower()
    others = [f"--{word}" for word in setting if word.split("=")[0] not in fields]
    for name, value in fields.items():
        section, field = name.split(".")
        with pytest.raises(ValueError, match=f"^{name}: has no effect, since .*; leave it out$"):
            load_config(config_class, [*others, f"--{name}={value}"])
        (tmp_path / "more.yaml").write_text(yaml.safe_dump({section: {field: value}}))
        files = ["--config", str(TINY / f"{stem}.yaml"), "--config", str(tmp_path / "more.yaml")]
        _, warnings = load_config(config_class, [*files, *others])
        warned = [warning.split(":")[0].split(", ") for warning in warnings if "no effect, since " in warning]
        assert sum(names.count(name) for names in warned) == 1


def test_warnings_of_one_reason_are_one_line(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"run": {"eval_every": 7, "eval_samples": 3}, "data": {"train": "x"}}))
    _, warnings = load_config(SFTConfig, ["--config", str(path)])
    assert warnings == ["run.eval_every, run.eval_samples: have no effect, since data.eval names no held-out data"]


def test_what_a_file_keeps_beside_a_rank_or_a_loss_of_the_command_line_is_said(tmp_path: Path):
    """The config.yaml of a run has its alpha and its loss's values written out; they are not those of another."""
    path = tmp_path / "config.yaml"
    values = {"lora": {"r": 8, "alpha": 16}, "loss": {"name": "robust", "label_smoothing": 0.1}, "data": {"train": "x"}}
    path.write_text(yaml.safe_dump(values))
    _, warnings = load_config(DPOConfig, ["--config", str(path), "--lora.r=64", "--loss.name=sigmoid"])
    assert warnings[:2] == [
        "lora.alpha: 16.0 is the file's; beside this lora.r null would be 128",
        "loss.label_smoothing: 0.1 is the file's; beside this loss.name null would be 0.0",
    ]
    for more in ([], ["--lora.r=8"], ["--lora.r=64", "--lora.alpha=16"], ["--loss.name=robust"]):
        _, warnings = load_config(DPOConfig, ["--config", str(path), *more])
        assert not any("is the file's" in warning for warning in warnings), more


def test_switching_off_what_is_off_is_no_mistake(tmp_path: Path):
    _, warnings = load_config(DPOConfig, ["--data.eval", "null", "--data.eval_sft", "null"])
    assert not any("eval_sft" in warning for warning in warnings)
    with pytest.raises(ValueError, match=r"^data\.eval_sft: has no effect"):
        load_config(DPOConfig, ["--data.eval", "null", "--data.eval_sft", "x.jsonl"])


def test_a_config_of_the_other_task_is_named_with_the_one_to_take():
    """A config of SFT ran DPO with SFT's rate and rank, in the folder of the SFT run."""
    for name in ("7b_qlora", "14b_lora"):
        sft, dpo = (f"configs/{task}_qwen2.5_{name}.yaml" for task in ("sft", "dpo"))
        with pytest.raises(ValueError) as caught:
            load_config(SFTConfig, ["--config", str(ROOT / dpo)])
        assert str(caught.value) == f"loss: {ROOT / dpo} is a config of DPO; give it to launch/dpo.py, or take {sft}"
        with pytest.raises(ValueError) as caught:
            load_config(DPOConfig, ["--config", str(ROOT / sft), "--data.train=pairs.jsonl"])
        assert str(caught.value) == (
            f"--config: {ROOT / sft} is no config of DPO: nothing says loss or reference; give it to launch/sft.py, "
            f"take {dpo}, or add --loss.name sigmoid if it is meant"
        )
    for said in ("--loss.name=sigmoid", "--loss.beta=0.1", f"--config={ROOT / dpo}"):
        assert load_config(DPOConfig, ["--config", str(ROOT / sft), said])[0].lora.r in (32, 64)
    with pytest.raises(ValueError, match=r"or take configs/sft_qwen2\.5_7b_lora\.yaml$"):
        load_config(SFTConfig, ["--config", str(EMBEDDED[DPOConfig])])


@pytest.mark.parametrize(
    "word, said",
    [("--shwo", "--shwo: no such option; did you mean --show?"), ("--x=1", "--x: no such option; see --help")],
)
def test_an_option_that_a_tool_has_not(word: str, said: str):
    parser = tool_parser("tool", "")
    parser.add_argument("--show")
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        load_for_tool(*parser.parse_known_args([word]))


def test_a_tool_prints_the_config(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        load_for_tool(*tool_parser("tool", "").parse_known_args(["--print_config"]))
    assert "max_length: 256" in capsys.readouterr().out


def test_a_tool_refuses_a_file_that_would_make_its_reader_recurse(tmp_path: Path):
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 3000)
    with pytest.raises(ValueError, match="is nested deeper than 20 levels"):
        load_for_tool(*tool_parser("tool", "").parse_known_args(["--config", str(path)]))


def test_active_fields_are_not_idle():
    config, warnings = load_config(SFTConfig, ["--lora.r=8", "--run.eval_every=5", "--optim.min_lr_ratio=0.2"])
    assert warnings == [] and config.lora.r == 8
    assert load_config(DPOConfig, ["--loss.name=simpo", "--loss.simpo_gamma=1.0"])[0].loss.name == "simpo"


# --- every field does something ---------------------------------------------------------------------------------------
#
# EFFECTS: field -> two values and what is looked at; what is looked at must differ. The observers below return plain
# values that are equal for equal configs, and that is a test of its own.


@dataclass(frozen=True)
class World:
    """Data, a finished run and whatever else the observers need."""

    folder: Path
    cache_dir: Path

    def config(self, config_class: type[SFTConfig], *arguments: str) -> SFTConfig:
        given = {
            "model.path": TINY / "model",
            "run.dir": self.folder / "runs",
            "data.train": self.folder / "rows.jsonl",
            "data.eval": self.folder / "eval.jsonl",
            "data.cache_dir": self.cache_dir,
            "batch.sequences_per_step": 8,
            "batch.tokens_per_microbatch": 512,
            "run.steps": 3,
            "run.log_every": 1,
            "run.eval_every": 2,
            "run.eval_samples": 2,
            "run.eval_sample_tokens": 3,
            "lora.r": 4,
        }
        if config_class is DPOConfig:
            given |= {
                "data.train": self.folder / "pairs.jsonl",
                "data.eval": self.folder / "pairs.jsonl",
                "data.eval_sft": "null",
                "model.adapter": "null",
                "model.from_scratch": "true",
                "run.eval_every": 0,
                "loss.sft_weight": "null",
            }
        words = [word.format(folder=self.folder).removeprefix("--") for word in arguments]
        overridden = {word.split("=")[0] for word in words}
        argv = [f"--{name}={value}" for name, value in given.items() if name not in overridden]
        dropped = ("lora.r",) if "lora.enabled=false" in words or "model.adapter_start=continue" in words else ()
        dropped += ("run.eval_every", "run.eval_samples", "run.eval_sample_tokens") if "data.eval=null" in words else ()
        dropped += ("run.eval_sample_tokens",) if "run.eval_samples=0" in words else ()
        dropped += ("run.steps",) if any(word.startswith("run.epochs") for word in words) else ()
        argv = [word for word in argv if not word.startswith(tuple(f"--{name}=" for name in dropped))]
        return load_config(config_class, [*argv, *(f"--{word}" for word in words)])[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, own_signals: None) -> World:
    folder = tmp_path_factory.mktemp("world")
    rows = [json.loads(line) for line in (TINY / "sft_train.jsonl").read_text().splitlines()[:20]]
    turns = [{"role": "user", "content": "Say ten."}, {"role": "assistant", "content": "ten"}]
    special = [
        {"messages": [{"role": "system", "content": "Be short."}, *turns]},
        {"messages": [{"role": "user", "content": "<|im_start|>x"}, turns[1]]},
        {"messages": turns * 5},
    ]
    write_rows(folder / "rows.jsonl", [*special, *rows])
    write_rows(folder / "other.jsonl", rows[:9])
    write_rows(folder / "eval.jsonl", rows[:4])
    pairs = (TINY / "dpo_train.jsonl").read_text().splitlines(keepends=True)[:16]
    (folder / "pairs.jsonl").write_text("".join(pairs))
    smaller = shutil.copytree(TINY / "model", folder / "smaller")
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    world = World(folder, cache_dir)
    sft.train(world.config(SFTConfig, f"run.dir={folder}/start", "data.eval=null"), Run(42, False))
    return world


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokens(world: World, *arguments: str) -> Any:
    """The token arrays of data.train, or why there are none."""
    config = world.config(SFTConfig, *arguments)
    try:
        data = tokenize(
            "sft",
            config.data.train,
            load_tokenizer(config.model),
            ChatOptions.from_config(config.data),
            format=config.data.format,
            workers=config.data.workers,
            cache_dir=config.data.cache_dir,
        )
    except ValueError as error:
        return str(error)
    return data.dataset.to_dict()


def model(world: World, *arguments: str) -> Any:
    """Trained weights, the base's, log-probs of a batch; how often the head, a recomputation, a compilation came."""
    config = with_candidate(world.config(SFTConfig, *arguments), recomputed=0, tokens=4096)
    data = tokenize(
        "sft",
        str(world.folder / "rows.jsonl"),
        load_tokenizer(config.model),
        ChatOptions(),
        cache_dir=world.cache_dir,
    )
    calls: list[Callable[..., Any]] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.append(function), function(*args, **kwargs))[1]

    product, recompute, compiled = logprobs.product_fp32, compile.checkpoint, [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "product_fp32", counted(product))
        patch.setattr(compile, "checkpoint", counted(recompute))
        patch.setattr(torch, "compile", lambda forward: compiled.append(1) or forward)
        try:
            lm = load_model(config, load_tokenizer(config.model), torch.device("cpu"), world.folder / "no-base", False)
        except ValueError as error:
            return str(error)
        torch.manual_seed(0)
        scores = lm(stream.collate_conversations(data.dataset)([0, 1, 2, 3]))
    trained = {name: (p.dtype, digest(p)) for name, p in trainable_parameters(lm).items()}
    return {
        "trained": trained,
        "base": {name: (p.dtype, digest(p)) for name, p in lm.causal_lm.named_parameters()},
        "logps": scores.logps.tolist(),
        "calls": (calls.count(product), calls.count(recompute), compiled),
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def hub_arguments(world: World, *arguments: str) -> Any:
    """What transformers is asked for."""
    config = world.config(SFTConfig, *arguments)
    asked: list[Any] = []

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        raise OSError("asked enough")

    with pytest.MonkeyPatch.context() as patch:
        for kind in (load.AutoConfig, load.AutoTokenizer, load.AutoModelForCausalLM):
            patch.setattr(kind, "from_pretrained", from_pretrained)
        for call in (load.load_tokenizer, load.load_model_config):
            with pytest.raises(ValueError, match="asked enough"):
                call(config.model)
    assert len(asked) == 2
    return [sorted(kwargs.items()) for _, kwargs in asked]


def optimizer(world: World, *arguments: str) -> Any:
    config = world.config(SFTConfig, *arguments)
    return type(build_optimizer([("w", torch.nn.Parameter(torch.zeros(2, 2)))], config.optim)).__name__


def training(world: World, *arguments: str) -> Any:
    """All that a short run leaves: its log, its checkpoints, its trained weights, its samples, its last words."""
    config_class, train = SFTConfig, sft.train
    return trained(world, config_class, train, arguments)


def preference_training(world: World, *arguments: str) -> Any:
    return trained(world, DPOConfig, dpo.train, arguments)


@functools.cache
def trained(world: World, config_class: type[SFTConfig], train: Callable[..., None], arguments: tuple[str, ...]) -> Any:
    runs = world.folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    try:
        config = world.config(config_class, *arguments)
    except ValueError as error:
        return str(error)
    loaders: list[int] = []
    loader = stream.DataLoader

    def counted(*args: Any, **kwargs: Any) -> Any:
        loaders.append(kwargs["num_workers"])
        return loader(*args, **kwargs)

    before = set(world.folder.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "DataLoader", counted)
        try:
            train(config, Run(config.run.seed, config.run.deterministic))
            is_deterministic = torch.are_deterministic_algorithms_enabled()
        except ValueError as error:
            return str(error)
        finally:
            torch.use_deterministic_algorithms(False)
    assert config.run.name is not None
    folder = Path(config.run.dir) / config.run.name
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    answers = "eval/samples/text_summary"
    texts = events.Tensors(answers) if answers in events.Tags()["tensors"] else []
    with open(next(iter(sorted((folder / "checkpoints").rglob("model.safetensors")))), "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    observed = {
        "place": str(folder),
        "log": read_metrics(folder),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "weights": weights,
        "samples": [(text.step, list(text.tensor_proto.string_val)) for text in texts],
        "loaders": loaders,
        "deterministic": is_deterministic,
        "new folders": sorted(path.name for path in set(world.folder.iterdir()) - before if path.name != "runs"),
        "reference cache": sorted(path.name for path in world.cache_dir.glob("ref*/*")),
    }
    shutil.rmtree(folder)
    return observed


def microbatches(world: World, *arguments: str) -> Any:
    """How many micro-batches a step has."""
    config = world.config(SFTConfig, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        counts: list[int] = []
        plan = stream.plan_microbatches

        def counted(*args: Any) -> Any:
            planned = plan(*args)
            counts.append(len(planned))
            return planned

        patch.setattr(stream, "plan_microbatches", counted)
        trained.__wrapped__(world, type(config), sft.train, arguments)
    return counts


def resuming(world: World, *arguments: str) -> Any:
    """A second start of the same run, which was stopped after its last checkpoint, with the arguments."""
    config = world.config(SFTConfig, "run.name=twice", "run.steps=1", "data.eval=null")
    sft.train(config, Run(42, False))
    status = world.folder / "runs/twice/status.json"
    status.write_text(status.read_text().replace('"finished"', '"interrupted"'))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            again = world.config(SFTConfig, "run.name=twice", "run.steps=1", "data.eval=null", *arguments)
            sft.train(again, Run(42, False))
    except ValueError as error:
        return str(error)
    finally:
        shutil.rmtree(world.folder / "runs/twice")
    return printed.getvalue()


def preference(world: World, *arguments: str) -> Any:
    """Losses of a few pairs."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0], dtype=torch.float64)
    config = world.config(DPOConfig, *arguments)
    assert isinstance(config, DPOConfig)
    policy, reference = -9 * torch.rand(10, generator=generator), -9 * torch.rand(10, generator=generator)
    pairs = Pairs.from_sequences(
        policy.double(),
        reference.double() if LOSSES[config.loss.name].needs_reference else None,
        lengths.repeat_interleave(2) + torch.tensor([0.0, 1.0]).repeat(5),
    )
    return preference_loss(pairs, config.loss).tolist()


def skipped_steps(world: World, *arguments: str) -> Any:
    """Of 100 steps with losses from 1 to 2 and one of 3 those that are skipped."""
    config, progress = world.config(SFTConfig, *arguments), Progress()
    losses = [1 + 0.01 * (step * 37 % 100) for step in range(100)]
    losses[80] = 3
    skipped = []
    for step, loss in enumerate(losses):
        skipped += [step] if judge(progress, config.optim, loss, 1.0)[0] else []
        progress.remember(loss, 1.0)
    return skipped


@dataclass(frozen=True)
class Effect:
    """Two values of a field, what to look at, and under which other settings."""

    first: Any
    second: Any
    observe: Callable[..., Any]
    others: tuple[str, ...] = ()


START = "start/tiny-sft"
ON_START = (f"model.path={{folder}}/{START}/base", "model.from_scratch=false")
EFFECTS = {
    "model.path": Effect(str(TINY / "model"), "{folder}/smaller", model),
    "model.revision": Effect("null", "main", hub_arguments, ("model.path=some/where",)),
    "model.from_scratch": Effect("true", "false", model),
    "model.quantization": Effect("none", "nf4", model, ("model.dtype=bfloat16",)),
    "model.adapter": Effect("null", f"{{folder}}/{START}/adapter", model, ON_START),
    "model.adapter_start": Effect("merge", "continue", model, (*ON_START, f"model.adapter={{folder}}/{START}/adapter")),
    "model.dtype": Effect("float32", "bfloat16", model),
    "model.attention": Effect("sdpa", "varlen", model),
    "model.compile": Effect("false", "true", model),
    "model.checkpoint_layers": Effect(0, 2, model),
    "model.head_chunk": Effect(4096, 2, model),
    "model.trust_remote_code": Effect("false", "true", hub_arguments),
    "lora.enabled": Effect("true", "false", model),
    "lora.r": Effect(4, 8, model),
    "lora.alpha": Effect("null", 3, training, ("data.eval=null",)),
    "lora.dropout": Effect(0, 0.5, training, ("data.eval=null",)),
    "lora.target_modules": Effect("all-linear", "[q_proj, v_proj]", model),
    "lora.use_rslora": Effect("false", "true", training, ("data.eval=null",)),
    "lora.use_dora": Effect("false", "true", model),
    "data.train": Effect("{folder}/rows.jsonl", "[{folder}/rows.jsonl, {{{folder}/other.jsonl: 0.5}}]", training),
    "data.eval": Effect("{folder}/eval.jsonl", "{folder}/other.jsonl", training),
    "data.eval_sft": Effect("null", "{folder}/eval.jsonl", preference_training),
    "data.format": Effect("auto", "alpaca", tokens),
    "data.max_length": Effect(256, 40, tokens),
    "data.too_long": Effect("drop", "error", tokens, ("data.max_length=40",)),
    "data.supervise": Effect("assistant", "last", tokens),
    "data.system": Effect("keep", "Be kind.", tokens),
    "data.control_tokens": Effect("escape", "reject", tokens),
    "data.shuffle": Effect("true", "false", training, ("data.eval=null",)),
    "data.workers": Effect(0, 1, training, ("data.eval=null",)),
    "data.cache_dir": Effect("{folder}/here", "{folder}/there", training, ("data.eval=null",)),
    "batch.sequences_per_step": Effect(8, 4, training, ("data.eval=null",)),
    "batch.tokens_per_microbatch": Effect(512, 256, microbatches, ("data.eval=null", "run.steps=1")),
    "optim.name": Effect("adamw", "adamw_8bit", optimizer),
    "optim.lr": Effect(1e-3, 2e-3, training, ("data.eval=null",)),
    "optim.schedule": Effect("cosine", "linear", training, ("data.eval=null", "run.steps=5")),
    "optim.warmup_ratio": Effect(0, 1, training, ("data.eval=null",)),
    "optim.min_lr_ratio": Effect(0, 0.5, training, ("data.eval=null",)),
    "optim.weight_decay": Effect(0, 0.5, training, ("data.eval=null",)),
    "optim.betas": Effect("[0.9, 0.98]", "[0.5, 0.98]", training, ("data.eval=null",)),
    "optim.max_grad_norm": Effect(0, 0.01, training, ("data.eval=null",)),
    "optim.spike_zscore": Effect(0, 3, skipped_steps),
    "optim.max_skipped": Effect(10, 1, training, ("data.eval=null", "optim.lr=1e38", "optim.warmup_ratio=0")),
    "run.name": Effect("one", "other", training, ("data.eval=null",)),
    "run.dir": Effect("{folder}/runs", "{folder}/elsewhere", training, ("data.eval=null",)),
    "run.seed": Effect(42, 43, training, ("data.eval=null",)),
    "run.deterministic": Effect("false", "true", training, ("data.eval=null",)),
    "run.epochs": Effect(1, 0.5, training, ("data.eval=null",)),
    "run.steps": Effect(2, 3, training, ("data.eval=null",)),
    "run.log_every": Effect(1, 2, training, ("data.eval=null",)),
    "run.eval_every": Effect(2, 1, training),
    "run.save_every": Effect(0, 2, training, ("data.eval=null",)),
    "run.keep": Effect(2, 1, training, ("run.save_every=1", "data.eval=null")),
    "run.resume": Effect("auto", "never", resuming),
    "run.accept_changes": Effect("false", "true", resuming, ("optim.lr=5e-4",)),
    "run.eval_samples": Effect(2, 3, training),
    "run.eval_sample_tokens": Effect(3, 5, training),
    "loss.name": Effect("sigmoid", "hinge", preference),
    "loss.beta": Effect(0.1, 0.5, preference),
    "loss.label_smoothing": Effect(0, 0.2, preference),
    "loss.sft_weight": Effect(0, 0.5, preference),
    "loss.ipo_norm": Effect("mean", "sum", preference, ("loss.name=ipo",)),
    "loss.simpo_gamma": Effect(0.5, 1.0, preference, ("loss.name=simpo",)),
    "loss.discopop_tau": Effect(0.05, 0.5, preference, ("loss.name=discopop",)),
    "reference.source": Effect("auto", "start_adapter", preference_training),
    "reference.path": Effect(str(TINY / "model"), "/nowhere", preference_training, ("reference.source=model",)),
    "reference.precompute": Effect("false", "true", preference_training),
    "reference.share_prompt": Effect("true", "false", preference_training),
}


def test_the_table_names_every_field():
    assert sorted(EFFECTS) == sorted(field_names(DPOConfig))
    assert set(field_names(SFTConfig)) < set(EFFECTS)


@pytest.mark.parametrize("name", EFFECTS)
def test_every_field_has_an_effect(name: str, world: World):
    effect = EFFECTS[name]
    first = effect.observe(world, *effect.others, f"{name}={effect.first}")
    second = effect.observe(world, *effect.others, f"{name}={effect.second}")
    assert first != second


@pytest.mark.parametrize("observe", [tokens, model, training, preference_training, resuming, preference])
def test_equal_configs_look_equal(observe: Callable[..., Any], world: World):
    """The negative control: what is looked at does not differ by itself."""
    first = observe(world)
    trained.cache_clear()
    assert observe(world) == first


def test_every_field_is_read():
    """Somewhere outside of what makes the config, as `config.section.field`, `section.field` or `config.field`."""
    read = set()
    for path in [*(ROOT / "qwen_train").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        if path.name in ("config.py", "command_line.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = (
                    owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                )
                read.add((name, node.attr))
    indirectly = {f"loss.{field.name}" for field in dataclasses.fields(LossConfig)}  # by name, out of a table
    for field in set(field_names(DPOConfig)) - indirectly - {"lora.alpha"}:  # alpha: as config.lora.scale_numerator
        section, name = field.split(".")
        assert (section, name) in read or ("config", name) in read, field
    assert ("optim", "no_such_field") not in read and ("config", "no_such_field") not in read
