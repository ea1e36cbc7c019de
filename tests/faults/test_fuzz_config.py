"""2,000 spoilt configs: each loads, or is refused with one line a problem; nothing else is raised and nothing hangs."""

import dataclasses
import json
import signal
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from qwen_train.command_line import load_config
from qwen_train.config import DataConfig, DPOConfig, RunConfig, SFTConfig, as_dict, to_yaml
from tests.faults.mutations import NUMBERS, TEXTS, junk
from tests.scripts import ROOT

SECONDS = 20
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "accelerate"]
FIELDS = sorted(
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(DPOConfig)
    for field in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
)
WORDS = [
    "auto", "null", "none", "true", "false", "yes", "on", "~", "0x10", "1e3", ".5", "1_000", "1e-400", "inf",
    "-.inf", ".nan", "[]", "{}", "[1, 2]", "[a.jsonl, {b.jsonl: 2}]", "{a: {b: c}}", "[[[]]]", "*a", "&a 1",
    "!!python/object:os.system x", "!!binary aGk=", "2026-01-01", "12:30:45", "- a", "a: b: c", "%", "@", "`",
    "?", "|", ">", "'", '"', "\t", "#", "---", "a" * 5000, "\u0085", "\u2028", "é", "🙂", "-1", "-0", "1.5",
    str(2**64), "9" * 400, "{", "[", "$HOME", "$(id)", "..", "/",
]  # fmt: skip


def value(dice: Random) -> Any:
    """What may stand for a field in a file."""
    return dice.choice([dice.choice(WORDS), dice.choice(NUMBERS), dice.choice(TEXTS), junk(dice)])


def spoilt_file(dice: Random, path: Path) -> str:
    """A shipped config with fields changed, added, taken away, or its YAML itself spoilt."""
    content = yaml.safe_load(path.read_text())
    for _ in range(dice.choice([0, 0, 1, 1, 2, 4])):
        section, name = dice.choice(FIELDS).split(".")
        change = dice.randrange(10)
        if change == 0:
            content[section] = value(dice)
        elif change == 1:
            content.pop(section, None)
        elif change == 2 and isinstance(content.get(section), dict):
            content[section][dice.choice(["", "lr ", "LR", "__class__", name + "s", 3, None, True])] = value(dice)
        elif change == 3:
            content[dice.choice(["optm", "", "config", "Model", 3, None, "__init__", section + "."])] = value(dice)
        elif isinstance(content.setdefault(section, {}), dict):
            content[section][name] = value(dice)
    text = yaml.safe_dump(content, allow_unicode=dice.random() < 0.5)
    change = dice.randrange(12)
    if change == 0:
        cut = dice.randrange(len(text))
        text = text[:cut] + dice.choice([*WORDS, "\x00", "\x07", "\t", ": ", "- "]) + text[cut:]
    elif change == 1:
        text = text.replace("  ", dice.choice(["\t", "", "   "]), dice.randrange(1, 4))
    elif change == 2:
        text += dice.choice(["\nmodel: {}\n", "\n<<: *x\n", "\na: &a [*a]\n", "\n--- \noptim: {}\n", "\n? a\n"])
    elif change == 3:
        text = dice.choice(["", "3", "[]", "null", "a", "[" * 3000, "{a: " * 500, "&a [*a]", "\ufeff" + text, "\x00"])
    return text


def spoilt_arguments(dice: Random) -> list[str]:
    arguments = []
    for _ in range(dice.choice([0, 0, 0, 1, 2])):
        name = dice.choice(
            [*FIELDS, *FIELDS, *FIELDS, "optim.lrr", "optim", "nothing", "model.path.x", "optim.lr+", "", "-"]
        )
        text = dice.choice([dice.choice(WORDS), str(dice.choice(NUMBERS)), json.dumps(junk(dice)), dice.choice(TEXTS)])
        text = text.replace("\0", "").encode(errors="replace").decode()  # what a shell can pass
        arguments += dice.choice([[f"--{name}={text}"], [f"--{name}", text], [f"--{name}"], [text], [f"-{name}", text]])
    return [word for word in arguments if not word.startswith(("--help", "-h", "--print", "--config"))]


class HangError(Exception):
    pass


def judge(dice: Random, folder: Path, counts: Counter[str]) -> None:
    """One spoilt config, read as the scripts read it; one that loads means the same when it is written and read."""
    path = dice.choice(CONFIGS)
    config_class = DPOConfig if "dpo" in path.name else SFTConfig
    argv = []
    if dice.random() < 0.7:
        spoilt = folder / "spoilt.yaml"
        spoilt.write_bytes(spoilt_file(dice, path).encode(errors="surrogatepass"))
        argv = ["--config", str(spoilt)]
    argv += spoilt_arguments(dice)

    def stop(*_: Any) -> None:
        raise HangError(argv)

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        config, warnings = load_config(config_class, argv)
    except ValueError as error:
        lines = str(error).split("\n")
        assert all(line.strip() and len(line) < 2000 for line in lines), lines
        str(error).encode()  # it can be printed
        assert type(error) is ValueError, type(error)
        counts["refused"] += 1
        return
    finally:
        signal.alarm(0)
    assert all("\n" not in warning for warning in warnings)
    again = folder / "again.yaml"
    again.write_text(to_yaml(config))
    assert as_dict(load_config(config_class, ["--config", str(again)])[0]) == as_dict(config)
    counts["loaded"] += 1


@pytest.mark.parametrize("examples", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_spoilt_configs_load_or_are_refused(examples: int, tmp_path: Path, record_property):
    counts: Counter[str] = Counter()
    for seed in range(examples):
        judge(Random(seed), tmp_path, counts)
    record_property("configs", f"{sum(counts.values()):,}, loaded {counts['loaded']:,}, refused {counts['refused']:,}")
    assert sum(counts.values()) == examples
    assert counts["loaded"] >= 0.05 * examples and counts["refused"] >= 0.3 * examples, "both sides are reached"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000, "is nested deeper than 20 levels"),
        ("data: {train: " + "{a: " * 500 + "1" + "}" * 501, "is nested deeper than 20 levels"),
        ("optim: &a {lr: 1.0e-3}\nlora: *a\n", "has an alias"),
        ("model: &a {path: *a}\n", "has an alias"),
    ],
)
def test_files_that_would_make_their_readers_recurse(text: str, message: str, tmp_path: Path):
    (tmp_path / "deep.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"^--config: .*deep.yaml {message}"):
        load_config(SFTConfig, ["--config", str(tmp_path / "deep.yaml")])


def test_values_of_any_length_make_a_short_line():
    with pytest.raises(ValueError, match=r"^optim\.lr: expected a number, got 'aaa.* \.\.\. a+'$") as caught:
        load_config(SFTConfig, [f"--optim.lr={'a' * 100_000}"])
    assert len(str(caught.value)) < 1100
    with pytest.raises(ValueError, match="command line: a value is nested too deeply"):
        load_config(SFTConfig, [f"--model.dtype={'[' * 3000}{']' * 3000}"])
    with pytest.raises(ValueError, match=r"^optim\.weight_decay: is beyond 1e308; give a smaller number$"):
        load_config(SFTConfig, [f"--optim.weight_decay={10**400}"])
    with pytest.raises(ValueError, match="File name too long; give a path that can exist"):
        load_config(SFTConfig, [f"--model.path={'a' * 5000}"])


@pytest.mark.parametrize("text", ["1e3", "1E+308", "-2e-5", "1_000", "1.", ".5", "007", "1e", "true", "1:30"])
def test_texts_that_look_like_something_else_are_read_back(text: str, tmp_path: Path):
    """A run called 1e3 has a config.yaml that `--config` reads."""
    config = SFTConfig(data=DataConfig(train="a.jsonl", system=text), run=RunConfig(name=text))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(SFTConfig, ["--config", str(tmp_path / "config.yaml")])[0] == config
