"""README, CONTRIBUTING and docs/ against the code: paths, commands, options, example rows, tables, metric names."""

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from qwen_train.command_line import load_config, task_of
from qwen_train.config import DPOConfig, SFTConfig
from qwen_train.data import formats
from qwen_train.loss.preference import LOSSES
from qwen_train.train.changes import HARMLESS
from qwen_train.train.evaluate import preference_metrics, under
from qwen_train.train.metrics import CONSOLE, CONSOLE_EVAL, Throughput
from qwen_train.train.status import OUTCOMES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIELDS = {
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(DPOConfig)
    for field in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
}
SECTIONS = {name.split(".")[0] for name in FIELDS}
PLACES = ("", "qwen_train/", "configs/", "docs/", "tests/")
MADE_BY_USERS = {"my.jsonl", "pairs.jsonl", "pairs2.jsonl", "held_out.jsonl", "a.jsonl", "b.jsonl"}
IN_A_RUN = {"config.yaml", "status.json", "metrics.jsonl", "incidents.jsonl"}
IN_A_RUN |= {"state.json", "manifest.json"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def fences(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def commands(text: str) -> list[str]:
    """The commands of all bash blocks, one line each, without comments."""
    lines = "\n".join(fences(text, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def rows_of(text: str, heading: str) -> Iterator[list[str]]:
    """Cells of the rows of every table whose header's first cell is `heading`."""
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if not cells:
            inside = False
        elif cells[0] == heading:
            inside = True
        elif inside and not set(cells[0]) <= set("-: "):
            yield cells


def tracked(*folders: str) -> set[str]:
    done = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout")
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


# --- files and options ------------------------------------------------------------------------------------------------


def missing_paths(text: str) -> set[str]:
    """Files with a suffix of ours that a text names and that are nowhere."""
    named = set(re.findall(r"(?<![\w/.<>-])[\w.-]+(?:/[\w.-]+)*\.(?:py|ya?ml|md|jsonl?|toml|txt|jinja)(?![\w/])", text))
    named |= set(re.findall(r"\b(?:configs|launch|docs|tests|qwen_train)/[\w./-]*\w", text))
    known = {name for name in named if any((ROOT / place / name).exists() for place in PLACES)}
    return named - known - MADE_BY_USERS - IN_A_RUN


def unknown_options(text: str) -> set[str]:
    """Fields of the config that a text names, as an option or as `section.field`, and that are none."""
    named = set(re.findall(r"--([a-z]+\.[a-z_0-9]+)", text))
    named |= {name for name in re.findall(r"`([a-z]+\.[a-z_0-9]+)[`:= ]", text) if name.split(".")[0] in SECTIONS}
    return {name for name in named if name not in FIELDS and not name.endswith((".py", ".yaml", ".json", ".jsonl"))}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_and_options_exist(document: Path):
    text = document.read_text()
    prose = FENCE.sub("", text) if document.name == "resume.md" else text  # its block is a run's folder
    if document == ROOT / "README.md":
        prose = prose.replace(tree_block(text), "")
    assert missing_paths(prose) == set()
    assert unknown_options(text) == set()


def test_planted_names_are_found():
    assert missing_paths("see configs/no_such.yaml and `train/no_such.py`, not `train/optim.py`") == {
        "configs/no_such.yaml",
        "train/no_such.py",
    }
    assert unknown_options("`optim.speed` and --run.colour 1, but `optim.lr: 1` and --run.name x") == {
        "optim.speed",
        "run.colour",
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def tree_block(text: str) -> str:
    return next(body for body in fences(text, "") if body.startswith("launch/ "))


def tree_files(block: str) -> set[str]:
    """Paths in a tree drawn by indentation, two blanks a level; folders end in a slash."""
    files, parents = set(), [""] * 10
    for line in block.splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        if name.endswith("/"):
            parents[level] = name
        else:
            files.add("".join(parents[:level]) + name)
    return files


def test_the_tree_is_that_of_the_checkout():
    """Every tracked file of qwen_train/ and launch/, but the __init__.py, and no other."""
    expected = {name for name in tracked("qwen_train", "launch") if not name.endswith("/__init__.py")}
    block = tree_block(text_of("README.md"))
    assert tree_files(block) == expected
    assert tree_files(block.replace("  sft.py", "  sfx.py", 1)) != expected
    for line in block.splitlines():
        assert (ROOT / line.split()[0]).exists() or line.startswith(" "), line


# --- commands ---------------------------------------------------------------------------------------------------------


def load_script(script: str) -> Any:
    spec = importlib.util.spec_from_file_location("a_script", ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem(command: str) -> str | None:
    """Why a command line would not even start; None if it would."""
    words = shlex.split(command, comments=True)
    try:
        if words[:2] == ["accelerate", "launch"]:
            launched = launch_command_parser().parse_args(words[2:])
            if launched.config_file is not None and not (ROOT / launched.config_file).exists():
                return f"{launched.config_file} does not exist"
            words = ["python", launched.training_script, *launched.training_script_args]
        if words[0] == "python":
            return script_problem(words[1], words[2:])
        if words[0] == "make":
            targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
            return None if set(words[1:]) <= targets else f"no target {words[1:]}"
    except (ValueError, SystemExit) as error:
        return str(error)
    return None


def script_problem(script: str, argv: list[str]) -> str | None:
    if not (ROOT / script).exists():
        return f"{script} does not exist"
    if script == "launch/merge.py":
        options = set(re.findall(r'add_argument\("(--\w+)"', text_of(script)))
        wrong = {word for word in argv if word.startswith("--")} - options
        return f"no options {wrong}" if wrong else None
    files: list[str] = []
    if script in ("launch/check.py", "launch/plan.py"):
        known, argv = load_script(script).parser().parse_known_args(argv)
        files = known.config
        argv = [word for path in files for word in ("--config", path)] + argv
    dpo = "dpo" in script or task_of(files, argv) == "dpo"
    _, warnings = load_config(DPOConfig if dpo else SFTConfig, argv)
    others = [warning for warning in warnings if "tiny-sft" not in warning]  # the embedded DPO without an SFT run
    return "; ".join(others) or None


ALL_COMMANDS = sorted({command for document in DOCUMENTS for command in commands(document.read_text())})


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert problem(command) is None


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch launch/sft.py --optim.speed 3",
        "accelerate launch launch/none.py",
        "accelerate launch --config_file configs/accelerate/none.yaml launch/sft.py",
        "python launch/merge.py --adaptor x",
        "python launch/check.py --config configs/none.yaml",
        "make none",
    ],
)
def test_a_wrong_command_is_not(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert problem(command) is not None


def test_scripts_of_the_readme_are_all_of_them():
    words = " ".join(ALL_COMMANDS)
    assert {f"launch/{path.name}" for path in (ROOT / "launch").glob("*.py")} == set(
        re.findall(r"launch/\w+\.py", words)
    )


@pytest.mark.parametrize(
    ("status", "starts_again"),
    [
        ({"outcome": "interrupted"}, True),
        ({"outcome": "failed"}, True),
        ({"outcome": "running"}, True),
        ({"outcome": "finished"}, False),
        ({"outcome": "refused"}, False),
        (None, False),  # refused before it began, which leaves no folder behind
    ],
)
def test_slurm_starts_again_what_can_go_on(status: dict[str, str] | None, starts_again: bool, tmp_path: Path):
    """The script from the end of its srun on, with a scontrol that leaves its words in a file."""
    (script,) = (body for body in fences(text_of("docs/machines.md"), "") if "#SBATCH" in body)
    after = script[script.index("folder=") :]
    if status is not None:
        folder = tmp_path / after.split("\n")[0].removeprefix("folder=")
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps(status))
    shell = 'scontrol() { echo "$@" > asked; }\nSLURM_JOB_ID=7\n' + f'python() {{ {sys.executable} "$@"; }}\n' + after
    subprocess.run(["bash", "-c", shell], cwd=tmp_path)
    asked = tmp_path / "asked"
    assert (asked.read_text() == "requeue 7\n") if starts_again else not asked.exists()


# --- example rows, tables ---------------------------------------------------------------------------------------------


def example_rows() -> list[dict[str, Any]]:
    blocks = [block for document in DOCUMENTS for block in fences(document.read_text(), "json")]
    return [json.loads(line) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("row", example_rows(), ids=lambda row: "+".join(row))
def test_example_rows_are_read(row: dict[str, Any]):
    kind: formats.Kind = "dpo" if "chosen" in row else "sft"
    parsed = formats.parse_row(json.dumps(row), kind)
    assert isinstance(parsed, formats.Preference if kind == "dpo" else formats.Conversation)


def test_every_format_has_an_example_and_a_row():
    rows = example_rows()
    shown = {formats.detect_format(row, "dpo" if "chosen" in row else "sft") for row in rows}
    assert shown == set(formats.FORMATS)
    table = {row[0].strip("`"): row[1:] for row in rows_of(text_of("docs/data.md"), "`data.format`")}
    expected = {
        name: [entry.kind.upper(), ", ".join(f"`{key}`" for key in entry.keys)]
        for name, entry in formats.FORMATS.items()
    }
    assert table == expected
    assert list(table) == list(expected), "the order decides"


@pytest.mark.parametrize("field", ["too_long", "supervise", "control_tokens"])
def test_every_choice_is_explained(field: str):
    named = {row[0].strip("`") for row in rows_of(text_of("docs/data.md"), f"`data.{field}`")}
    data = next(section.default_factory for section in dataclasses.fields(SFTConfig) if section.name == "data")
    choices = re.findall(r"'(\w+)'", str(next(f.type for f in dataclasses.fields(data) if f.name == field)))  # type: ignore[arg-type]
    assert named == set(choices) and choices


def test_losses_and_their_defaults():
    rows = list(rows_of(text_of("docs/losses.md"), "`loss.name`"))
    stated = {
        row[0].strip("`"): {name: value for name, value in re.findall(r"`(\w+)` ([\w.]+)", row[2])} for row in rows
    }
    assert stated == {
        name: {field: str(value) for field, value in loss.defaults.items()} for name, loss in LOSSES.items()
    }
    without = text_of("docs/losses.md").split("## Without one")[1]
    named = {row[0].strip("`") for row in rows_of(without, "`loss.name`")}
    assert named == {name for name, loss in LOSSES.items() if not loss.needs_reference}


def test_what_a_resumed_run_may_change():
    text = text_of("docs/resume.md").split("These may change:")[1].split("A folder that")[0]
    assert set(re.findall(r"`([\w.]+)`", text)) == HARMLESS
    assert [row[0].strip("`") for row in rows_of(text_of("docs/resume.md"), "`outcome`")] == list(OUTCOMES)


# --- metrics ----------------------------------------------------------------------------------------------------------


def literal_metrics(path: Path) -> set[str]:
    """Keys of dictionaries in a source that look like metrics."""
    keys = (key for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Dict) for key in node.keys)
    return {
        str(key.value)
        for key in keys
        if isinstance(key, ast.Constant) and re.fullmatch(r"(train|eval|perf)/\w+(/\w+)*", str(key.value))
    }


def emitted_metrics() -> set[str]:
    """Every name the code logs: literals, the preference metrics, throughput, and the guard of skills."""
    sources = [ROOT / "qwen_train" / name for name in ("sft.py", "dpo.py", "train/evaluate.py")]
    names = set().union(*(literal_metrics(path) for path in sources))
    two_pairs = [2.0, *[1.0] * 13, 0.5, 3.0, 3.0, 0.1]  # unequal margins and lengths: a correlation
    for prefix in ("train", "eval"):
        names |= preference_metrics(prefix, two_pairs).keys()
    names |= Throughput(torch.device("cpu"), lambda length: 1.0, 1, unit="pairs").read().keys()
    of_sft = {name for name in literal_metrics(ROOT / "qwen_train/train/evaluate.py") if name.count("/") == 1}
    return names | under("eval/sft", dict.fromkeys(of_sft, 0.0)).keys() | {"eval/samples"}


def test_metrics_are_those_the_code_logs():
    documented = set(re.findall(r"`((?:train|eval|perf)/[\w/]+)`", text_of("docs/metrics.md")))
    emitted = emitted_metrics()
    assert {"train/grad_norm", "eval/loss", "train/rewards/length_correlation", "eval/sft/exact_match"} <= emitted
    assert documented == emitted
    assert {*CONSOLE, *CONSOLE_EVAL} <= emitted
