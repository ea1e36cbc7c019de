"""A command line and its YAML files -> the config, with warnings; what the tools' options are; who prints mistakes.

`--config` files are read from left to right, dotted options override them wherever they stand, and without any file the
embedded tiny config of `configs/tiny/` is put first. A field without effect under the others' values is an error on the
command line and a warning in a file.
"""

import argparse
import dataclasses
import difflib
import itertools
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from qwen_train.config import (
    EVAL_FIELDS,
    REPOSITORY,
    Config,
    DataConfig,
    DPOConfig,
    Kind,
    LoraConfig,
    RunConfig,
    SFTConfig,
    as_dict,
    field_types,
    reference_source,
    sections_of,
    to_yaml,
)
from qwen_train.config_errors import nearest, one_line

OWN_DATA = {"data.train", "data.eval", "data.eval_sft"}
MAX_DEPTH = 20  # levels of a YAML file: sections, fields, a list, {path: weight}, and room
MAX_MESSAGE = 1000  # characters of a line about a mistake
TIMED_NAME = re.compile(r".+-\d{8}-\d{6}(-\d+)?")  # a run.name that was made up from the time
MADE_UP: set[str] = set()  # those of this process: a new run's, whatever folder has the name by now
EMBEDDED = {SFTConfig: REPOSITORY / "configs/tiny/sft.yaml", DPOConfig: REPOSITORY / "configs/tiny/dpo.yaml"}


def from_command_line(config_class: type[Config]) -> tuple[Config, list[str]]:
    """`load_config` of this process's command line; mistakes are printed and end the process with code 2."""
    try:
        return load_config(config_class, sys.argv[1:])
    except ValueError as error:
        refuse_alike(str(error))


def refuse_alike(message: str, code: int = 2) -> NoReturn:
    """End with `code` for what every process finds wrong; the first of each machine says so."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_errors(message)
    sys.exit(code)


def print_warnings(warnings: Sequence[str]) -> None:
    """Of the config, by the first process of all: they have the same one, or are refused."""
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)


def print_errors(message: str) -> None:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)


def load_config(config_class: type[Config], argv: Sequence[str], embedded: bool = True) -> tuple[Config, list[str]]:
    """Config of a command line, and warnings about it; `run.name` is always filled in.

    With no `--config` in argv the embedded tiny YAML is put first (unless `embedded` is false). `--help` prints and
    exits; so does `--print_config`, without a made-up name. Raises ValueError with one line a problem.
    """
    try:
        return _load_config(config_class, list(argv), embedded)
    except ValueError as error:  # any value may be part of it
        lines = str(error).encode(errors="backslashreplace").decode().split("\n")
        raise ValueError("\n".join(_shortened(line) for line in lines)) from None
    except OSError as error:  # of a text that is asked whether it names a folder
        raise ValueError(_shortened(f"{error.filename!r}: {error.strerror}; give a path that can exist")) from None
    except RecursionError:
        raise ValueError("command line: a value is nested too deeply; fields hold texts, numbers and lists") from None


def _shortened(line: str) -> str:
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE // 2]} ... {line[-MAX_MESSAGE // 2 :]}"


def _load_config(config_class: type[Config], argv: list[str], embedded: bool) -> tuple[Config, list[str]]:
    prints, (named, argv) = "--print_config" in argv, _config_apart(argv)
    by_default = not named and embedded
    files = [EMBEDDED[config_class]] if by_default else [Path(path) for path in named]
    in_files = set().union(*(_file_keys(path, config_class) for path in files)) if files else set()
    options = [word.split("=")[0].removesuffix("+")[2:] for word in argv if word.startswith("--")]
    on_command_line = {option for option in options if "." in option}
    for section in sections_of(config_class).keys() & set(options):
        raise ValueError(f"{section}: is a section; give its fields, as --{section}.field value, or a file as --config")
    if config_class is DPOConfig and named and task_of(named, argv) == "sft":
        raise ValueError(_no_config_of_dpo(files[-1]))
    config = _parsed(config_class, files, _one_length(argv, in_files, on_command_line))
    notices: list[str] = []
    if files and files[0] == EMBEDDED[config_class]:
        config = _from_repository(config)
        if files == [EMBEDDED[config_class]]:
            config, notices = _without_tiny_eval(config, on_command_line)
        if by_default and config_class is DPOConfig and "model.adapter" not in on_command_line:
            config, more = _from_tiny_sft(config)
            notices += more
        if by_default and on_command_line & OWN_DATA:
            notices.insert(0, _of_the_demo(config, on_command_line))
    if config.run.name is None and not prints:
        stem = files[-1].stem if files else config_class.__name__.removesuffix("Config").lower()
        name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        MADE_UP.add(name)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    notices += _kept_of_files(config, on_command_line, in_files)
    notices += _judge_idle(config, on_command_line, in_files)
    if prints:  # not by jsonargparse, which knows nothing of what is done above
        print_warnings(notices)
        print(to_yaml(config), end="")
        sys.exit(0)
    return config, notices


def build_parser(config_class: type[Config]) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        description=config_class.__doc__, exit_on_error=False, allow_abbrev=False, print_config=None
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win.")
    parser.add_argument("--print_config", action="store_true", help="Print what files and options come to, and exit.")
    parser.add_class_arguments(config_class)
    for action in parser._actions:
        if action.dest in sections_of(config_class):
            action.help = argparse.SUPPRESS  # a file for one section: `load_config` knows whole files only
    return parser


def _parsed(config_class: type[Config], files: Sequence[Path], argv: Sequence[str]) -> Config:
    """What jsonargparse makes of files and, over them, a command line. Raises ValueError in one line."""
    parser = build_parser(config_class)
    try:
        # It reads from left to right, and a file overrides what stands before it.
        namespace = parser.parse_args([*(f"--config={path}" for path in files), *argv])
        fields = parser.instantiate(namespace).as_dict()
    except (argparse.ArgumentError, TypeError, yaml.YAMLError) as error:
        raise ValueError(one_line(str(error), config_class)) from None
    except OverflowError:  # an integer that no float can hold
        texts = [*argv, *(path.read_text() for path in files)]
        names = (match[1] for text in texts for match in re.finditer(r"([\w.]+)(?:=|: *)-?\d{300,}", text))
        raise ValueError(f"{next(names, 'a number')}: is beyond 1e308; give a smaller number") from None
    del fields["config"], fields["print_config"]
    return config_class(**fields)


def _config_apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of `--config` in their order, and all other words."""
    named, others = [], []
    words = iter(argv)
    for word in words:
        value = next(words, None) if word == "--config" else None
        if value is not None:
            named.append(value)
        elif word.startswith("--config="):
            named.append(word.removeprefix("--config="))
        else:
            others.append(word)
    return named, others


def _one_length(argv: list[str], in_files: set[str], on_command_line: set[str]) -> list[str]:
    """`--run.steps` on the command line replaces a file's `run.epochs`, and the other way round; null does not."""
    for given, other in (("run.steps", "run.epochs"), ("run.epochs", "run.steps")):
        if given in on_command_line and other in in_files and other not in on_command_line:
            if _last_value(argv, given).lower() in ("null", "~"):  # in YAML's words
                return argv
            return [*argv, f"--{other}", "null"]
    return argv


def _kept_of_files(config: SFTConfig, on_command_line: set[str], in_files: set[str]) -> list[str]:
    """A warning for each value of a file beside which the command line changes what its default would hang on.

    The config.yaml of a run has all of them written out: `--lora.r 64` alone would leave its alpha of 16.
    """
    defaults: dict[str, Any] = {}
    if "lora.r" in on_command_line:
        defaults["lora.alpha"] = LoraConfig(r=config.lora.r).scale_numerator
    if isinstance(config, DPOConfig) and "loss.name" in on_command_line:
        loss = type(config.loss)(name=config.loss.name).resolved()
        defaults |= {f"loss.{field.name}": getattr(loss, field.name) for field in dataclasses.fields(loss)}
    warnings = []
    for name, default in defaults.items():
        section, field = name.split(".")
        value = getattr(getattr(config, section), field)
        if name in in_files - on_command_line and None not in (value, default) and value != default:
            cause = "lora.r" if section == "lora" else "loss.name"
            warnings.append(f"{name}: {value} is the file's; beside this {cause} null would be {default}")
    return warnings


def _last_value(argv: Sequence[str], name: str) -> str:
    """The word that a command line gives a field, of several the one that counts."""
    value = ""
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word == f"--{name}":
            value = following
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# A field without effect: an error on the command line, a warning in a file.


def _idle_fields(config: SFTConfig) -> dict[str, str]:
    """Fields that the other values leave without effect -> why."""
    idle: dict[str, str] = {}
    of_adapter = [f"lora.{f.name}" for f in dataclasses.fields(LoraConfig) if f.name != "enabled"]
    if not config.lora.enabled:
        idle |= dict.fromkeys(of_adapter, "lora.enabled is false")
    elif config.model.continues:
        idle |= dict.fromkeys(of_adapter, "adapter_start continue keeps the adapter's own")
    if config.model.adapter is None:
        idle["model.adapter_start"] = "model.adapter names no adapter"
    if Path(config.model.path).is_dir():
        idle["model.revision"] = "model.path is a folder"
    if config.optim.schedule == "constant":
        idle["optim.min_lr_ratio"] = "optim.schedule is constant"
    if not config.data.eval:
        idle |= dict.fromkeys([f"run.{name}" for name in EVAL_FIELDS], "data.eval names no held-out data")
    elif config.run.eval_samples == 0:
        idle["run.eval_sample_tokens"] = "run.eval_samples is 0"
    if not config.data.eval or not isinstance(config, DPOConfig):
        idle["data.eval_sft"] = "it goes with DPO's data.eval"
    if isinstance(config, DPOConfig):
        idle |= {f"loss.{name}": f"loss {config.loss.name} does not use it" for name in config.loss.unused}
        idle["data.supervise"] = "DPO scores the answers"
        source = reference_source(config)
        if source is None:
            names = ["source", "path", "precompute"]
            idle |= dict.fromkeys([f"reference.{name}" for name in names], f"loss {config.loss.name} has no reference")
        elif source != "model":
            idle["reference.path"] = f"reference.source is {source}"
    return idle


def _judge_idle(config: SFTConfig, on_command_line: set[str], in_files: set[str]) -> list[str]:
    """Refuse (ValueError) what the command line sets without effect; warnings, one a reason, of what a file does."""
    idle, given = _idle_fields(config), as_dict(config)
    # A whole config, such as a run's own config.yaml, names every field: only what is set to something is worth a word.
    unset = as_dict(type(config)(data=DataConfig(train=config.data.train)))

    def value(values: dict[str, dict[str, Any]], key: str) -> Any:
        section, name = key.split(".")
        return values[section][name]

    refused = [key for key in sorted(on_command_line & idle.keys()) if value(given, key) is not None]
    if refused:
        raise ValueError("\n".join(f"{key}: has no effect, since {idle[key]}; leave it out" for key in refused))
    warned: dict[str, list[str]] = {}
    for key in sorted(in_files & idle.keys()):
        if value(given, key) != value(unset, key):
            warned.setdefault(idle[key], []).append(key)
    return [
        f"{', '.join(keys)}: {'has' if len(keys) == 1 else 'have'} no effect, since {reason}"
        for reason, keys in warned.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# YAML files


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error; plain YAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for position, key in enumerate(keys) if key in keys[:position]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _file_keys(path: Path, config_class: type[SFTConfig]) -> set[str]:
    """Dotted names of the fields a YAML file gives. Raises ValueError where it cannot be read or names no field."""
    sections, names = sections_of(config_class), set()
    for section, fields in _read_yaml(path).items():
        if config_class is SFTConfig and section in ("loss", "reference"):
            like = _counterpart(path, "dpo", "sft")
            raise ValueError(f"{section}: {path} is a config of DPO; give it to launch/dpo.py, or take {like}")
        if section == "compute_environment":
            raise ValueError(f"--config: {path} is for accelerate: accelerate launch --config_file {path} launch/...")
        if section not in sections:
            raise ValueError(f"{section}: no such section in {path}{nearest(str(section), list(sections))}")
        if not isinstance(fields, dict):
            raise ValueError(
                f"{section}: must hold fields, got {fields!r} in {path}; write them below it, or leave it out"
            )
        names |= {f"{section}.{name}" for name in fields}
    for name in sorted(names):
        if name not in field_types(config_class):
            raise ValueError(f"{name}: no such field in {path}{nearest(name, list(field_types(config_class)))}")
    return names


def _no_config_of_dpo(path: Path) -> str:
    """Of files that say nothing of a loss: their rate, rank and name of the run are most likely SFT's."""
    return (
        f"--config: {path} is no config of DPO: nothing says loss or reference; give it to launch/sft.py, take "
        f"{_counterpart(path, 'sft', 'dpo')}, or add --loss.name sigmoid if it is meant"
    )


def _counterpart(path: Path, task: Kind, other: Kind) -> str:
    """The shipped config for the other task that is most like a file."""
    like = REPOSITORY / "configs" / path.name.replace(task, other)
    return f"configs/{like.name if like.is_file() else f'{other}_qwen2.5_7b_lora.yaml'}"


def _read_yaml(path: Path) -> dict[Any, Any]:
    """What a YAML file holds, section by section. Raises ValueError."""
    try:
        text = path.read_text()
        _refuse_depth(text, path)
        content = yaml.load(text, _UniqueKeys)
    except FileNotFoundError:
        here = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(f"--config: {path} does not exist{here}; the shipped ones: {REPOSITORY / 'configs'}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config: {path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} must hold sections such as `model:`, got {type(content).__name__}")
    return content


def _refuse_depth(text: str, path: Path) -> None:
    """Refuse (ValueError) YAML that would make its readers recurse: deep nesting, aliases (a tree within itself)."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            what = "has an alias (*name)" if depth <= MAX_DEPTH else f"is nested deeper than {MAX_DEPTH} levels"
            raise ValueError(f"--config: {path} {what}; write sections, fields and their values")


# ---------------------------------------------------------------------------------------------------------------------
# The embedded default


def _from_repository(config: Config) -> Config:
    """The embedded default's own paths, found wherever the command is started."""

    def absolute(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("configs/tiny/") and not Path(value).exists():
            return str(REPOSITORY / value)
        return value

    model = dataclasses.replace(config.model, path=absolute(config.model.path))
    paths = {name: absolute(getattr(config.data, name)) for name in ("train", "eval", "eval_sft")}
    data = dataclasses.replace(config.data, **paths)
    return dataclasses.replace(config, model=model, data=data)


def _without_tiny_eval(config: Config, on_command_line: set[str]) -> tuple[Config, list[str]]:
    """Own training rows are not judged by the embedded default's held-out questions: the config, and a word on it."""
    if "data.train" not in on_command_line:
        return config, []
    dropped: dict[str, Any] = {name: None for name in ("eval", "eval_sft") if f"data.{name}" not in on_command_line}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **dropped))
    if "eval" not in dropped:
        return config, []
    unused = {name: getattr(RunConfig, name) for name in EVAL_FIELDS if f"run.{name}" not in on_command_line}
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, **unused))
    notice = "data.eval: the tiny questions go with the tiny rows; without --data.eval FILE nothing is evaluated"
    return config, [notice]


def _of_the_demo(config: SFTConfig, on_command_line: set[str]) -> str:
    """What to tell a person whose own rows meet the embedded default."""
    if "model.path" in on_command_line:
        what = "these are the demo's settings"
    else:
        what = f"this is the demo's tiny {'random ' * config.model.from_scratch}model"
    task = "dpo" if isinstance(config, DPOConfig) else "sft"
    return f"no --config: {what}; give e.g. --config configs/{task}_qwen2.5_7b_lora.yaml"


def _from_tiny_sft(config: Config) -> tuple[Config, list[str]]:
    """The embedded DPO default starts from the tiny SFT run of the same `run.dir`, else from the base: what it says."""
    adapter = Path(config.run.dir) / "tiny-sft" / "adapter"
    if adapter.is_dir():
        return dataclasses.replace(config, model=dataclasses.replace(config.model, adapter=str(adapter))), []
    path = Path(config.model.path)
    has_weights = not path.is_dir() or any(path.glob("*.safetensors"))
    model = dataclasses.replace(config.model, adapter=None, from_scratch=not has_weights)
    start = config.model.path if has_weights else f"random weights of {config.model.path}"
    notice = f"model.adapter: there is no {adapter} (launch/sft.py makes it); starting from {start}"
    return dataclasses.replace(config, model=model), [notice]


# ---------------------------------------------------------------------------------------------------------------------
# Tools beside the trainings


def tool_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """For a tool beside the trainings: `--config`, `--task`, options of its own; other words are the config's."""
    made = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="All fields of the config are options too (--section.field value), as for launch/sft.py --help.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    made.add_argument("--config", action="append", default=[], help="the training's YAML; without, the tiny default")
    made.add_argument("--task", choices=["sft", "dpo"], help="default: dpo if the config says loss or reference")
    return made


def load_for_tool(options: argparse.Namespace, others: Sequence[str]) -> tuple[Kind, SFTConfig, list[str]]:
    """The task, its config and the warnings of what `tool_parser` has parsed and left over. Raises ValueError."""
    known = ("print_config", *sections_of(DPOConfig))
    refuse_options([word for word in others if "." not in word.split("=")[0]], options, known)
    task = options.task or task_of(options.config, others)
    argv = [*itertools.chain.from_iterable(("--config", path) for path in options.config), *others]
    config, warnings = load_config(SFTConfig if task == "sft" else DPOConfig, argv)
    return task, config, warnings


def task_of(files: Sequence[str], argv: Sequence[str]) -> Kind:
    """`dpo` where a config file or the command line has a section that only DPO knows."""
    sections = {word[2:].split(".")[0] for word in argv if word.startswith("--")}
    for file in files:
        try:
            sections |= _read_yaml(Path(file)).keys()
        except ValueError:
            return "sft"  # load_config says what is wrong with the file
    return "dpo" if sections & {"loss", "reference"} else "sft"


def refuse_options(words: Sequence[str], options: argparse.Namespace, known: Sequence[str] = ()) -> None:
    """Refuse (ValueError) options that a script has not, by the words that it left over, with the nearest it has."""
    names = [word.split("=")[0][2:] for word in words if word.startswith("--")]
    for name in [name for name in names if name not in known]:
        near = difflib.get_close_matches(name, [option.replace("_", "-") for option in vars(options)], n=1)
        raise ValueError(f"--{name}: no such option; {f'did you mean --{near[0]}?' if near else 'see --help'}")
