"""The config that a run goes on under, against the one it was trained under: what differs, what is refused."""

import dataclasses
import json
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from qwen_train.config import DPOConfig, LoraConfig, SFTConfig, as_dict
from qwen_train.loss.preference import LOSSES

C = TypeVar("C", bound=SFTConfig)

# Fields that leave the course of training as it is, or move it by rounding only (how a step is cut up and computed).
HARMLESS = frozenset(
    {
        "run.name", "run.dir", "run.resume", "run.accept_changes", "run.log_every", "run.eval_every", "run.save_every",
        "run.keep", "run.eval_samples", "run.eval_sample_tokens", "run.deterministic",
        "data.eval", "data.eval_sft", "data.workers", "data.cache_dir",
        "batch.tokens_per_microbatch",
        "model.attention", "model.compile", "model.checkpoint_layers", "model.head_chunk", "model.trust_remote_code",
        "optim.max_skipped", "reference.precompute", "reference.share_prompt",
    }
)  # fmt: skip
# Fields that say where something lies: going on compares what lies there with what lay there (`progress.restore`).
PLACES = frozenset({"data.train", "model.path", "model.revision", "model.adapter", "reference.path"})
ABSENT = "(absent)"
CHANGED = "changed "
"""How a line of a run's history begins."""


@dataclass(frozen=True)
class ConfigChange:
    """One field that differs between a checkpoint's config and the one given now."""

    field: str
    old: Any
    new: Any

    @property
    def changes_result(self) -> bool:
        return self.field not in HARMLESS

    def __str__(self) -> str:
        return f"{self.field} was {self.old!r} and is now {self.new!r}"


def config_changes(old: dict[str, Any], new: dict[str, Any]) -> list[ConfigChange]:
    """The leaves in which two configs (nested dicts) differ, in the new one's order; lists and tuples are alike."""
    before, after = _leaves(old), _leaves(new)
    changes = [ConfigChange(field, before.get(field, ABSENT), after.get(field, ABSENT)) for field in after | before]
    return [change for change in changes if change.old != change.new]


def _leaves(config: dict[str, Any]) -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; a mapping below that stays a value (data.train's weights)."""
    return {
        f"{section}.{name}": json.loads(json.dumps(value))
        for section, fields in config.items()
        for name, value in fields.items()
    }


def changes_since(stored: dict[str, Any], config: SFTConfig) -> list[ConfigChange]:
    """How a config differs from that of a run that goes on under it, both with their defaults written out.

    What an earlier version did not store yet stood at its default; a whole section is missing of another kind of run.
    """
    stored = {section: dict(values) for section, values in stored.items()}
    for section in stored.keys() & {section.name for section in dataclasses.fields(config)}:
        for one in dataclasses.fields(getattr(config, section)):
            if one.name not in stored[section] and one.default is not MISSING:
                stored[section][one.name] = one.default
    lora, loss = stored.get("lora", {}), stored.get("loss", {})
    if lora.get("enabled") and lora.get("alpha", 0) is None:
        lora["alpha"] = LoraConfig(r=lora["r"]).scale_numerator
    if loss.get("name") in LOSSES:
        loss |= {name: value for name, value in LOSSES[loss["name"]].defaults.items() if loss.get(name) is None}
    return config_changes(stored, as_dict(written_out(config)))


def written_out(config: C) -> C:
    """The config with the defaults that hang on other fields as values: what a run was trained under must not change
    with what this code makes of null."""
    if config.lora.enabled:
        config = replace(config, lora=replace(config.lora, alpha=config.lora.scale_numerator))
    return replace(config, loss=config.loss.resolved()) if isinstance(config, DPOConfig) else config


def with_resolved(config: SFTConfig, stored: dict[str, Any]) -> SFTConfig:
    """`config` with the numbers that its `auto` values were given when the run began."""
    for section, old in stored.items():
        values: Any = getattr(config, section, None)
        numbers = {
            name: value
            for name, value in old.items()
            if isinstance(value, int) and getattr(values, name, None) == "auto"
        }
        if numbers:
            changed: dict[str, Any] = {section: replace(values, **numbers)}
            config = replace(config, **changed)
    return config


def besides_places(changes: list[ConfigChange]) -> list[ConfigChange]:
    """The changes but for another place of the same thing, which has yet to prove that it is the same."""
    return [change for change in changes if change.field not in PLACES or None in (change.old, change.new)]


def require_same_result(changes: list[ConfigChange], checkpoint: Path) -> None:
    """Refuse (ValueError, one line) to go on under a config that would lead elsewhere than the run's own."""
    if listing := changes_of_result(changes):
        raise ValueError(
            f"{checkpoint}: the config has changed in what shapes the result: {listing}; "
            "restore it to resume, start over with another run.name, or set run.accept_changes"
        )


def changes_of_result(changes: list[ConfigChange]) -> str:
    """The changes that would lead elsewhere, with both values; "" if none would."""
    return ", ".join(str(change) for change in changes if change.changes_result)


def accepted(changes: list[ConfigChange], checkpoint: Path | None) -> tuple[str, ...]:
    """What `run.accept_changes` let pass, a line of the run's history each."""
    return tuple(history_line(change, checkpoint) for change in changes if change.changes_result)


def history_line(change: object, checkpoint: Path | None) -> str:
    """What has changed, and where in the run."""
    return f"{CHANGED}{f'after {checkpoint.name}' if checkpoint else 'before any checkpoint'}: {change}"
