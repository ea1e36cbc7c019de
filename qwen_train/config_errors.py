"""What was wrong with a command line or a YAML file, in one line: jsonargparse speaks of parser keys and classes."""

import difflib
import re
import types
import typing
from typing import Any, Literal

from qwen_train.config import DPOConfig, SFTConfig, field_types

OF_OTHER_TRAINERS = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "num_train_epochs": "run.epochs",
    "num_epochs": "run.epochs",
    "max_steps": "run.steps",
    "output_dir": "run.dir",
    "logging_steps": "run.log_every",
    "eval_steps": "run.eval_every",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep",
    "batch_size": "batch.sequences_per_step",
    "micro_batch_size": "batch.sequences_per_step",
    "per_device_train_batch_size": "batch.sequences_per_step",
    "gradient_accumulation_steps": "batch.sequences_per_step",
    "gradient_checkpointing": "model.checkpoint_layers",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "load_in_4bit": "model.quantization",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "beta": "loss.beta",
    "loss_type": "loss.name",
}
"""What TRL, Axolotl and LLaMA-Factory call a field."""


def one_line(message: str, config_class: type[SFTConfig]) -> str:
    """jsonargparse's message in our words: the field, what was expected, what was got."""
    message = " ".join(message.split())
    hints = field_types(config_class)
    if match := re.match(r"(?:Parser key |argument -*)\"?(?P<name>[\w.]+)", message):
        value = re.search(r"(?:Got|Given) value: ?(?P<value>.*)$", message)
        got = repr(value["value"]) if value else "nothing"
        if match["name"] in hints:
            return f"{match['name']}: expected {_expected(hints[match['name']])}, got {got}"
        if match["name"] == "print_config":
            return "--print_config: takes no value"
        return f"--{match['name']}: expected a file, got {got}; see --help"
    if match := re.match(r"unrecognized arguments: (?P<word>\S+)", message):
        name = match["word"].removeprefix("--").split("=")[0]
        if match["word"].startswith("--"):
            if name in field_types(DPOConfig):
                return f"{name}: is a field of DPO; give it to launch/dpo.py, or leave it out"
            return f"{name}: no such field{nearest(name, list(hints))}"
        fields = "fields are given as --section.field value, several as '[a, b]'"
        if name.endswith((".yaml", ".yml")):
            fields = f"a file is given as --config {name}"
        return f"command line: {name!r} belongs to no option; {fields}"
    return message


def nearest(name: str, names: list[str]) -> str:
    """The end of a line about an unknown name: the field that was meant, or what there is."""
    meant = OF_OTHER_TRAINERS.get(name.rpartition(".")[2].replace("-", "_"), "")
    if meant and any(known in (meant, meant.partition(".")[0]) for known in names):
        return f"; did you mean {meant}?"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return (
        f"; did you mean {near[0]}?"
        if near
        else f"; there are {', '.join(names)}"
        if len(names) < 10
        else "; see --help"
    )


def _expected(hint: Any) -> str:
    """A type hint in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_expected(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return str(choices[0]) if len(choices) == 1 else f"one of {', '.join(map(str, choices))}"
    if typing.get_origin(hint) is tuple:
        return f"{len(typing.get_args(hint))} values such as [0.9, 0.999]"
    if typing.get_origin(hint) is dict:
        return "{path: weight}"
    assert typing.get_origin(hint) is list, hint
    return f"a list of ({_expected(typing.get_args(hint)[0])})"
