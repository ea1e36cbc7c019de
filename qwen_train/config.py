"""Typed config: frozen dataclasses, read by jsonargparse from a YAML file and dotted overrides on the command line.

The attribute docstrings are the `--help`. The defaults are those of a 7B LoRA run; `configs/tiny/` is what runs when
the command line names no config. What can be known to be wrong before a model loads is refused here, in one line that
names the field, what was got and the remedy.
"""

import argparse
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import jsonargparse
import yaml

from qwen_train.loss.preference import LOSSES, LossConfig

REPOSITORY = Path(__file__).resolve().parent.parent
DataPaths = str | list[str | dict[str, float]]
Kind = Literal["sft", "dpo"]
ReferenceSource = Literal["adapter_off", "start_adapter", "model"]
HEADS = ("lm_head", "embed_tokens")
"""Last names of the modules beside the decoder layers, on which no adapter is trained."""
OWN_DATA = {"data.train", "data.eval", "data.eval_sft"}
EVAL_FIELDS = ("eval_every", "eval_samples", "eval_sample_tokens")
MAX_STEPS = 10**9  # of a run: three years at 10 a second; dates and clocks end a few powers of ten above
MAX_DEPTH = 20  # levels of a YAML file: sections, fields, a list, {path: weight}, and room
MAX_MESSAGE = 1000  # characters of a line about a mistake
TIMED_NAME = re.compile(r".+-\d{8}-\d{6}(-\d+)?")  # a run.name that was made up from the time
MADE_UP: set[str] = set()  # those of this process: a new run's, whatever folder has the name by now


def _refuse(problems: Sequence[str | None]) -> None:
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError("\n".join(found))


def _unless(valid: bool, message: str) -> str | None:
    return None if valid else message


def _pattern_problem(targets: str | list[str]) -> str | None:
    """What is wrong with a single text, which PEFT takes for a pattern of whole names."""
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as error:
        return f"lora.target_modules: {targets} is no pattern ({error}); give names as [q_proj, v_proj], or all-linear"
    return None


def _path_problems(field: str, paths: DataPaths | None) -> Iterator[str]:
    for path in paths if isinstance(paths, list) else [paths]:
        # What is no list of paths or {path: weight} reaches us as the text it was given as.
        if isinstance(path, str) and path.lstrip().startswith(("[", "{")):
            yield f"{field}: expected a path or a list, got {path}; write it as [a.jsonl, {{b.jsonl: 2}}]"


def _expand_home(section: Any, name: str, *paths: str) -> None:
    """`~` at the beginning of the paths of a section that is being made, as the home that a shell makes of it.

    Raises ValueError for the home of nobody, and for a variable, which only a shell expands.
    """

    def expanded(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [expanded(key, part) for part in value]
        if isinstance(value, dict):
            return {expanded(key, path): weight for path, weight in value.items()}
        if not isinstance(value, str):
            return value
        path = os.path.expanduser(value)
        if path.startswith("~"):
            raise ValueError(f"{name}.{key}: {value} begins with no user's home; give the whole path, or ./{value}")
        if re.search(r"\$\{?\w", path) and not os.path.exists(path):
            raise ValueError(f"{name}.{key}: {value} holds a variable, which only a shell expands; give the whole path")
        return path

    for key in paths:
        object.__setattr__(section, key, expanded(key, getattr(section, key)))  # the dataclass is frozen


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, from where, and how it computes."""

    path: str = "Qwen/Qwen2.5-7B-Instruct"
    """Hub id or folder of a Qwen2 / Qwen2.5 / Qwen3 dense model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of `path`; not for folders."""
    from_scratch: bool = False
    """Random weights from the folder's config.json, seeded by `run.seed`: for the demo and for benchmarks."""
    quantization: Literal["none", "nf4", "fp8"] = "none"
    """Storage of the frozen base: none, nf4 (bitsandbytes, double quantisation), fp8 (e4m3, per-row scales)."""
    adapter: str | None = None
    """PEFT adapter folder to start from."""
    adapter_start: Literal["merge", "continue"] = "merge"
    """merge: `adapter` is merged into the base and a fresh LoRA is trained on top; continue: it is trained further."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Computing type. Trained weights always have fp32 masters."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Packed attention: flash-attn (flash-attn-4 before it on H100, H200 and B200), torch's varlen kernel, or the SDPA
    reference; auto takes the first there is."""
    compile: bool = True
    """torch.compile each decoder layer (one compilation serves all layers)."""
    checkpoint_layers: int | Literal["auto"] = "auto"
    """Number of decoder layers whose activations are recomputed in backward; auto: as few as fit."""
    head_chunk: int = 4096
    """Rows of hidden states for which the head forms logits at a time (tokens)."""
    trust_remote_code: bool = False
    """Run model code from the hub. Qwen models need none."""

    def __post_init__(self) -> None:
        _expand_home(self, "model", "path", "adapter")
        _refuse(
            [
                _unless(bool(self.path), "model.path: must name a hub id or a folder, got nothing; give one"),
                _unless(self.head_chunk > 0, f"model.head_chunk: must be > 0 tokens, got {self.head_chunk}; try 4096"),
                _unless(
                    self.checkpoint_layers == "auto" or self.checkpoint_layers >= 0,
                    f"model.checkpoint_layers: must be auto or >= 0, got {self.checkpoint_layers}; 0: none",
                ),
                _unless(
                    self.dtype == "bfloat16" or self.quantization == "none",
                    f"model.dtype: {self.quantization} computes in bfloat16, got {self.dtype}; set bfloat16",
                ),
            ]
        )

    @property
    def continues(self) -> bool:
        """Whether training goes on with the adapter that it starts from."""
        return self.adapter is not None and self.adapter_start == "continue"

    @property
    def merges(self) -> bool:
        """Whether training starts from an adapter that is merged into the base."""
        return self.adapter is not None and self.adapter_start == "merge"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter that is trained."""

    enabled: bool = True
    """Train a LoRA adapter; false trains every weight."""
    r: int = 64
    """Rank."""
    alpha: float | None = None
    """Scale numerator: the update is alpha / r * B A; None is 2 r."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that get an adapter, or all-linear (every one but the head)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilised LoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353): slower, and adapters cannot be concatenated."""

    def __post_init__(self) -> None:
        targets = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        _refuse(
            [
                _unless(self.r > 0, f"lora.r: must be > 0, got {self.r}; try 64, or lora.enabled false"),
                _unless(0 <= self.dropout < 1, f"lora.dropout: must be in [0, 1), got {self.dropout}; try 0.05"),
                _unless(
                    self.alpha is None or self.alpha > 0,
                    f"lora.alpha: must be > 0, got {self.alpha}; leave it out for 2 r",
                ),
                _unless(bool(targets), "lora.target_modules: no layer named; say all-linear"),
                _pattern_problem(self.target_modules),
                *(
                    f"lora.target_modules: {name} cannot have an adapter, since the chunked head reads its weight "
                    "directly; leave it out or train with lora.enabled false"
                    for name in targets
                    if name.split(".")[-1] in HEADS
                ),
            ]
        )

    @property
    def beyond_plain(self) -> str | None:
        """What is set of dropout and DoRA, which model/lora.py leaves to PEFT's own layers."""
        return f"lora.dropout {self.dropout}" if self.dropout > 0 else "lora.use_dora true" if self.use_dora else None

    @property
    def scale_numerator(self) -> float:
        return 2 * self.r if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows, and how they become tokens."""

    train: DataPaths = ""
    """Training rows: a file (.jsonl, .json, .parquet), a `datasets` folder or a hub id; or a list of them, where
    `path: weight` shows that source's rows `weight` times an epoch (0: never)."""
    eval: DataPaths | None = None
    """Held-out rows: a path or a list, as `train`, each row scored once (`path: 0` leaves a path out)."""
    eval_sft: DataPaths | None = None
    """DPO: held-out conversations whose loss and right answers are measured beside the pairs, as a guard of skills."""
    format: str = "auto"
    """Row format (messages, prompt_completion, alpaca, sharegpt ...); auto looks at the row's keys."""
    max_length: int = 4096
    """Longest sequence (tokens); for pairs: prompt and the longer answer."""
    too_long: Literal["drop", "trim_turns", "error"] = "drop"
    """Rows over max_length: drop (counted), trim_turns (oldest whole turns go; answers stay whole), error."""
    supervise: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that are learnt: those of every assistant turn, of the last one, or all."""
    system: str = "keep"
    """keep the row's system message (the template may add its default), none (no system prompt), or a text for all."""
    control_tokens: Literal["escape", "reject", "allow"] = "escape"
    """Control tokens such as <|im_start|> inside content: spelt out as text, refused, or passed through."""
    shuffle: bool = True
    """A new order every epoch, from (run.seed, epoch)."""
    workers: int = 2
    """Processes that tokenise, and that collate ahead of the step; 0: in the main process."""
    cache_dir: str = "~/.cache/qwen_train"
    """Folder of tokenised data and reference log-probs."""

    def __post_init__(self) -> None:
        _expand_home(self, "data", "train", "eval", "eval_sft", "cache_dir")
        _refuse(
            [
                *(
                    problem
                    for name in ("train", "eval", "eval_sft")
                    for problem in _path_problems(f"data.{name}", getattr(self, name))
                ),
                _unless(self.max_length > 1, f"data.max_length: must be > 1 token, got {self.max_length}; try 4096"),
                _unless(self.workers >= 0, f"data.workers: must be >= 0, got {self.workers}; 0 uses the main process"),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What one step and one forward hold."""

    sequences_per_step: int = 32
    """Sequences (or pairs) of one optimizer step, over all GPUs."""
    tokens_per_microbatch: int | Literal["auto"] = "auto"
    """Most tokens of one forward on one GPU; auto: what fits."""

    def __post_init__(self) -> None:
        tokens = self.tokens_per_microbatch
        _refuse(
            [
                _unless(
                    self.sequences_per_step > 0,
                    f"batch.sequences_per_step: must be > 0, got {self.sequences_per_step}; try 32",
                ),
                _unless(
                    tokens == "auto" or tokens > 0,
                    f"batch.tokens_per_microbatch: must be auto or > 0, got {tokens}; try 16384",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw (fused, fp32 moments) or adamw_8bit (bitsandbytes, 8-bit moments; not under FSDP2); masters are fp32."""
    lr: float = 2e-5
    """Peak learning rate (per step)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up, a closed form of the step."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the rate rises linearly to lr."""
    min_lr_ratio: float = 0.1
    """Rate the schedule falls to by the end of the run, as a share of lr."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment, per step."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    spike_zscore: float = 6.0
    """A step is skipped whose loss or gradient norm lies this many standard deviations above those of the last 128; 0:
    never. One that is not finite is skipped in any case."""
    max_skipped: int = 10
    """Skipped steps in a row that end the run."""

    def __post_init__(self) -> None:
        _refuse(
            [
                _unless(
                    math.isfinite(self.lr) and self.lr > 0, f"optim.lr: must be > 0, got {self.lr}; 2e-5 suits LoRA"
                ),
                _unless(
                    0 <= self.warmup_ratio <= 1,
                    f"optim.warmup_ratio: must be in [0, 1], got {self.warmup_ratio}; try 0.03",
                ),
                _unless(
                    0 <= self.min_lr_ratio <= 1,
                    f"optim.min_lr_ratio: must be in [0, 1], got {self.min_lr_ratio}; try 0.1",
                ),
                _unless(self.weight_decay >= 0, f"optim.weight_decay: must be >= 0, got {self.weight_decay}; try 0"),
                _unless(
                    all(0 <= beta < 1 for beta in self.betas),
                    f"optim.betas: both must be in [0, 1), got {self.betas}; try [0.9, 0.999]",
                ),
                _unless(
                    self.max_grad_norm >= 0,
                    f"optim.max_grad_norm: must be >= 0, got {self.max_grad_norm}; 0 turns clipping off",
                ),
                _unless(
                    self.spike_zscore >= 0,
                    f"optim.spike_zscore: must be >= 0, got {self.spike_zscore}; try 6, or 0 for no check",
                ),
                _unless(self.max_skipped > 0, f"optim.max_skipped: must be > 0 steps, got {self.max_skipped}; try 10"),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen policy that a preference loss compares with."""

    source: Literal["auto", "adapter_off", "start_adapter", "model"] = "auto"
    """adapter_off: the model without its adapter; start_adapter: a frozen copy of the adapter that training continues;
    model: another model (`path`); auto: the one that equals the policy at step 0."""
    path: str | None = None
    """Hub id or folder of the reference, with source model."""
    precompute: bool = False
    """Score all pairs once before training and keep the log-probs in data.cache_dir."""
    share_prompt: bool = True
    """Lay a pair out as prompt, chosen, rejected with the prompt once; false lays the prompt out twice."""

    def __post_init__(self) -> None:
        _expand_home(self, "reference", "path")
        if self.source == "model" and self.path is None:
            raise ValueError("reference.path: source model needs a path, got none; name the reference model")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name, length and rhythm of the run."""

    name: str | None = None
    """Folder of the run inside `dir`; None: the config's stem and the time."""
    dir: str = "runs"
    """Folder of all runs, where `tensorboard --logdir` looks."""
    seed: int = 42
    """Seed of data order, dropout and fresh weights."""
    deterministic: bool = False
    """Deterministic GPU kernels: slower, the same bits every time."""
    epochs: float | None = None
    """Passes over the training rows; 1 if neither epochs nor steps is given."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 200
    """Steps between evaluations; one stands before the first step and one after the last. 0: only those two."""
    save_every: int = 200
    """Steps between checkpoints; the last step always saves. 0: only then."""
    keep: int = 2
    """Checkpoints kept."""
    resume: str = "auto"
    """auto: go on from the run's newest valid checkpoint if there is one; never: the run must be new; or a checkpoint
    folder."""
    accept_changes: bool = False
    """Go on although fields that shape the result, or the data, have changed; noted in config.yaml and state.json."""
    eval_samples: int = 8
    """Greedy answers generated for the first held-out rows at each evaluation."""
    eval_sample_tokens: int = 256
    """Most new tokens of a generated answer."""

    def __post_init__(self) -> None:
        name = self.name
        _expand_home(self, "run", "dir", "resume")
        _refuse(
            [
                _unless(bool(self.dir), "run.dir: must name a folder, got nothing; leave it out for runs"),
                _unless(
                    name is None or (name not in ("", ".", "..") and not set(name) & set("/\\\0")),
                    f"run.name: must be a plain folder name, got {name!r}; use run.dir for the place",
                ),
                _unless(
                    self.epochs is None or self.steps is None,
                    f"run.steps: got both steps {self.steps} and epochs {self.epochs}; give one of them",
                ),
                _unless(
                    self.epochs is None or 0 < self.epochs <= MAX_STEPS,
                    f"run.epochs: must be in (0, {MAX_STEPS:,}], got {self.epochs}; try 1",
                ),
                _unless(
                    self.steps is None or 0 < self.steps <= MAX_STEPS,
                    f"run.steps: must be in [1, {MAX_STEPS:,}], got {self.steps}; try 100",
                ),
                _unless(0 <= self.seed < 2**32, f"run.seed: must be in [0, 2^32), got {self.seed}; try 42"),
                _unless(self.log_every > 0, f"run.log_every: must be > 0 steps, got {self.log_every}; try 10"),
                _unless(self.keep > 0, f"run.keep: must be > 0 checkpoints, got {self.keep}; try 2"),
                *(
                    _unless(value >= 0, f"run.{key}: must be >= 0, got {value}; 0 turns it off")
                    for key, value in [
                        ("eval_every", self.eval_every),
                        ("save_every", self.save_every),
                        ("eval_samples", self.eval_samples),
                    ]
                ),
                _unless(
                    self.eval_sample_tokens > 0,
                    f"run.eval_sample_tokens: must be > 0 tokens, got {self.eval_sample_tokens}; try 256",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        tokens = self.batch.tokens_per_microbatch
        _refuse(
            [
                _unless(bool(self.data.train), "data.train: no training data named; give a file, folder or hub id"),
                _unless(
                    self.lora.enabled or self.model.quantization == "none",
                    f"model.quantization: {self.model.quantization} weights cannot be trained, got lora.enabled false; "
                    "set lora.enabled true or quantization none",
                ),
                _unless(
                    self.model.quantization != "fp8"
                    or not self.lora.enabled
                    or self.model.continues  # resolve_start asks the adapter's own
                    or not self.lora.beyond_plain,
                    f"model.quantization: fp8 takes plain LoRA only, got {self.lora.beyond_plain}; leave it out, or "
                    "take nf4 or none",
                ),
                _unless(
                    tokens == "auto" or isinstance(self, DPOConfig) or tokens >= self.data.max_length,
                    f"batch.tokens_per_microbatch: {tokens} cannot hold one sequence of data.max_length "
                    f"{self.data.max_length}; raise it or lower max_length",
                ),
                _unless(
                    self.lora.enabled or self.model.adapter is None or self.model.adapter_start == "merge",
                    "model.adapter_start: continue trains the adapter, got lora.enabled false; use merge",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class DPOConfig(SFTConfig):
    """Direct preference optimisation."""

    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


def reference_source(config: SFTConfig) -> ReferenceSource | None:
    """Where DPO's reference comes from; None for a loss without one. `auto` is what equals the policy at step 0.

    Raises ValueError for a source that the start of training cannot give.
    """
    if not isinstance(config, DPOConfig) or not LOSSES[config.loss.name].needs_reference:
        return None
    source = config.reference.source
    if source == "auto":
        return "model" if not config.lora.enabled else "start_adapter" if config.model.continues else "adapter_off"
    if source == "adapter_off" and not config.lora.enabled:
        raise ValueError(
            "reference.source: adapter_off needs an adapter to switch off, got lora.enabled false; use auto, which "
            "keeps a second copy of the start"
        )
    if source == "start_adapter" and not config.model.continues:
        raise ValueError(
            "reference.source: start_adapter is for training that continues an adapter, got "
            f"model.adapter {config.model.adapter} with adapter_start {config.model.adapter_start}; use auto"
        )
    return source


Config = TypeVar("Config", bound=SFTConfig)
EMBEDDED = {SFTConfig: REPOSITORY / "configs/tiny/sft.yaml", DPOConfig: REPOSITORY / "configs/tiny/dpo.yaml"}


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


# ---------------------------------------------------------------------------------------------------------------------
# Parsing


def build_parser(config_class: type[Config]) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(description=config_class.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win.")
    parser.add_class_arguments(config_class)
    for action in parser._actions:
        if action.dest in _sections(config_class):
            action.help = argparse.SUPPRESS  # a file for one section: `load_config` knows whole files only
    return parser


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

    With no `--config` in argv the embedded tiny YAML is put first (unless `embedded` is false). `--help` and
    `--print_config` print and exit. Raises ValueError with one line a problem.
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
    named, argv = _config_apart(argv)
    by_default = not named and embedded
    files = [EMBEDDED[config_class]] if by_default else [Path(path) for path in named]
    in_files = set().union(*(_file_keys(path, config_class) for path in files)) if files else set()
    options = [word.split("=")[0].removesuffix("+")[2:] for word in argv if word.startswith("--")]
    on_command_line = {option for option in options if "." in option}
    for section in _sections(config_class).keys() & set(options):
        raise ValueError(f"{section}: is a section; give its fields, as --{section}.field value, or a file as --config")
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
    if config.run.name is None:
        stem = files[-1].stem if files else config_class.__name__.removesuffix("Config").lower()
        name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        MADE_UP.add(name)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    return config, notices + _judge_idle(config, on_command_line, in_files)


def _parsed(config_class: type[Config], files: Sequence[Path], argv: Sequence[str]) -> Config:
    """What jsonargparse makes of files and, over them, a command line. Raises ValueError in one line."""
    parser = build_parser(config_class)
    try:
        # It reads from left to right, and a file overrides what stands before it.
        namespace = parser.parse_args([*(f"--config={path}" for path in files), *argv])
        fields = parser.instantiate(namespace).as_dict()
    except (argparse.ArgumentError, TypeError, yaml.YAMLError) as error:
        raise ValueError(_one_line(str(error), config_class)) from None
    except OverflowError:  # an integer that no float can hold
        texts = [*argv, *(path.read_text() for path in files)]
        names = (match[1] for text in texts for match in re.finditer(r"([\w.]+)(?:=|: *)-?\d{300,}", text))
        raise ValueError(f"{next(names, 'a number')}: is beyond 1e308; give a smaller number") from None
    fields.pop("config", None)
    return config_class(**fields)


def _judge_idle(config: SFTConfig, on_command_line: set[str], in_files: set[str]) -> list[str]:
    """Refuse (ValueError) what the command line sets without effect; warnings, one a reason, of what a file does."""
    idle, given = _idle_fields(config), as_dict(config)
    # A whole config, such as a run's own config.yaml, names every field: only what is set to something is worth a word.
    unset = as_dict(type(config)(data=DataConfig(train=config.data.train)))

    def value(values: dict[str, dict[str, Any]], key: str) -> Any:
        section, name = key.split(".")
        return values[section][name]

    refused = [key for key in sorted(on_command_line & idle.keys()) if value(given, key) is not None]
    _refuse([f"{key}: has no effect, since {idle[key]}; leave it out" for key in refused])
    warned: dict[str, list[str]] = {}
    for key in sorted(in_files & idle.keys()):
        if value(given, key) != value(unset, key):
            warned.setdefault(idle[key], []).append(key)
    return [
        f"{', '.join(keys)}: {'has' if len(keys) == 1 else 'have'} no effect, since {reason}"
        for reason, keys in warned.items()
    ]


def task_of(files: Sequence[str], argv: Sequence[str]) -> Kind:
    """`dpo` where a config file or the command line has a section that only DPO knows."""
    sections = {word[2:].split(".")[0] for word in argv if word.startswith("--")}
    for file in files:
        try:
            sections |= _read_yaml(Path(file)).keys()
        except ValueError:
            return "sft"  # load_config says what is wrong with the file
    return "dpo" if sections & {"loss", "reference"} else "sft"


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
    known = ("print_config", *_sections(DPOConfig))
    refuse_options([word for word in others if "." not in word.split("=")[0]], options, known)
    task = options.task or task_of(options.config, others)
    argv = [*itertools.chain.from_iterable(("--config", path) for path in options.config), *others]
    config, warnings = load_config(SFTConfig if task == "sft" else DPOConfig, argv)
    return task, config, warnings


def refuse_options(words: Sequence[str], options: argparse.Namespace, known: Sequence[str] = ()) -> None:
    """Refuse (ValueError) options that a script has not, by the words that it left over, with the nearest it has."""
    names = [word.split("=")[0][2:] for word in words if word.startswith("--")]
    for name in [name for name in names if name not in known]:
        near = difflib.get_close_matches(name, [option.replace("_", "-") for option in vars(options)], n=1)
        raise ValueError(f"--{name}: no such option; {f'did you mean --{near[0]}?' if near else 'see --help'}")


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
    sections, names = _sections(config_class), set()
    for section, fields in _read_yaml(path).items():
        if config_class is SFTConfig and section in ("loss", "reference"):
            raise ValueError(f"{section}: {path} is a config of DPO; give it to launch/dpo.py")
        if section not in sections:
            raise ValueError(f"{section}: no such section in {path}{_nearest(str(section), list(sections))}")
        if not isinstance(fields, dict):
            raise ValueError(
                f"{section}: must hold fields, got {fields!r} in {path}; write them below it, or leave it out"
            )
        names |= {f"{section}.{name}" for name in fields}
    for name in sorted(names):
        if name not in _field_types(config_class):
            raise ValueError(f"{name}: no such field in {path}{_nearest(name, list(_field_types(config_class)))}")
    return names


def _read_yaml(path: Path) -> dict[Any, Any]:
    """What a YAML file holds, section by section. Raises ValueError."""
    try:
        text = path.read_text()
        _refuse_depth(text, path)
        content = yaml.load(text, _UniqueKeys)
    except FileNotFoundError:
        raise ValueError(f"--config: {path} does not exist; the shipped ones are in configs/") from None
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


def _one_length(argv: list[str], in_files: set[str], on_command_line: set[str]) -> list[str]:
    """`--run.steps` on the command line replaces a file's `run.epochs`, and the other way round; null does not."""
    for given, other in (("run.steps", "run.epochs"), ("run.epochs", "run.steps")):
        if given in on_command_line and other in in_files and other not in on_command_line:
            if _last_value(argv, given).lower() in ("null", "~"):  # in YAML's words
                return argv
            return [*argv, f"--{other}", "null"]
    return argv


def _last_value(argv: Sequence[str], name: str) -> str:
    """The word that a command line gives a field, of several the one that counts."""
    value = ""
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word == f"--{name}":
            value = following
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


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


def _sections(config_class: type[SFTConfig]) -> dict[str, Any]:
    """Section -> its dataclass."""
    return {section.name: section.default_factory for section in dataclasses.fields(config_class)}


def _field_types(config_class: type[SFTConfig]) -> dict[str, Any]:
    """Dotted names of all fields -> their type hints."""
    return {
        f"{section}.{name}": hint
        for section, kind in _sections(config_class).items()
        for name, hint in typing.get_type_hints(kind).items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# What was wrong, in one line: jsonargparse speaks of parser keys and Python classes.


def _one_line(message: str, config_class: type[SFTConfig]) -> str:
    message = " ".join(message.split())
    hints = _field_types(config_class)
    if match := re.match(r"(?:Parser key |argument -*)\"?(?P<name>[\w.]+)", message):
        value = re.search(r"(?:Got|Given) value: ?(?P<value>.*)$", message)
        got = repr(value["value"]) if value else "nothing"
        if match["name"] in hints:
            return f"{match['name']}: expected {_expected(hints[match['name']])}, got {got}"
        return f"--{match['name']}: expected a file, got {got}; see --help"
    if match := re.match(r"unrecognized arguments: (?P<word>\S+)", message):
        name = match["word"].removeprefix("--").split("=")[0]
        if match["word"].startswith("--"):
            return f"{name}: no such field{_nearest(name, list(hints))}"
        return f"command line: {name!r} belongs to no option; fields are given as --section.field value"
    return message


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


def _nearest(name: str, names: list[str]) -> str:
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


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def as_dict(config: SFTConfig) -> dict[str, dict[str, Any]]:
    """Plain nested values, as YAML and JSON hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: SFTConfig) -> str:
    """The whole config as YAML that `--config` reads back."""
    return yaml.dump(as_dict(config), Dumper=_Quoting, sort_keys=False)


class _Quoting(yaml.SafeDumper):
    """YAML in which a text such as 1e3 is quoted: jsonargparse takes it for a number, PyYAML by itself does not."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = "'" if re.fullmatch(r"[-+]?[\d._]+([eE][-+]?\d+)?", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Quoting.add_representer(str, _Quoting.represent_str)


def config_hash(value: Any) -> str:
    """Short sha256 of plain values: names caches and tells runs apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
