"""Typed config: frozen dataclasses, made by command_line.py of YAML files and dotted overrides.

The attribute docstrings are the `--help`. The defaults are those of a 7B LoRA run; `configs/tiny/` is what runs when
the command line names no config. What can be known to be wrong before a model loads is refused here, in one line that
names the field, what was got and the remedy.
"""

import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from qwen_train.loss.preference import LOSSES, LossConfig

REPOSITORY = Path(__file__).resolve().parent.parent
DataPaths = str | list[str | dict[str, float]]
Kind = Literal["sft", "dpo"]
ReferenceSource = Literal["adapter_off", "start_adapter", "model"]
HEADS = ("lm_head", "embed_tokens")
"""Last names of the modules beside the decoder layers, on which no adapter is trained."""
EVAL_FIELDS = ("eval_every", "eval_samples", "eval_sample_tokens")
MAX_STEPS = 10**9  # of a run: three years at 10 a second; dates and clocks end a few powers of ten above
MAX_SEQUENCES = 10**6  # of a step: some hundred million tokens; who writes more means the rows of the data, or tokens


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
        """What is set of dropout and DoRA, which model/fuse.py leaves to PEFT's own layers."""
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
                    0 < self.sequences_per_step <= MAX_SEQUENCES,
                    f"batch.sequences_per_step: must be in [1, {MAX_SEQUENCES:,}], got {self.sequences_per_step}; try "
                    "32",
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
    """Go on although fields that shape the result, the data, the start or the reference have changed; noted in
    config.yaml and state.json."""
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


def sections_of(config_class: type[SFTConfig]) -> dict[str, Any]:
    """Section -> its dataclass."""
    return {section.name: section.default_factory for section in dataclasses.fields(config_class)}


def field_types(config_class: type[SFTConfig]) -> dict[str, Any]:
    """Dotted names of all fields -> their type hints."""
    return {
        f"{section}.{name}": hint
        for section, kind in sections_of(config_class).items()
        for name, hint in typing.get_type_hints(kind).items()
    }


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
