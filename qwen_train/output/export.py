"""What a run hands over: PEFT adapter folders, Hugging Face model folders, tokenizer and template, the model card.

A folder appears whole or not at all (and replaces an earlier one of its name in one rename); safetensors, JSON and text
only. Cards name no absolute path and no secret: they are made to be published.
"""

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_train.data.sources import is_hub_id
from qwen_train.model.adapters import BASE
from qwen_train.model.load import FAMILIES
from qwen_train.train.files import replacing_folder, write_bytes_atomic, write_file, write_tensors

MAX_SHARD_SIZE = "5GB"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank takes
REDACTED = "(redacted)"
SECRET_NAME = re.compile(r"(^|_)(token|key|api_?key|secret|passw(or)?d|passphrase|credentials?|auth)(_|$)")
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{12,})"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
# A path from the root, a home or a drive, but no part of a relative one, and not what follows "https:".
ABSOLUTE_PATH = re.compile(r"""(?:file://|(?<![\w./:~\\-])|(?<=:)(?!//))(?:~\w*/|/|[A-Za-z]:\\)[^\s"',;)\]]+""")

CardKind = Literal["adapter", "merged", "full"]


# Folders -------------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path,
    peft_model: PeftModel,
    state_dict: Mapping[str, Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    base_name: str,
    of_base: Mapping[str, Any],
    *,
    card: str | None = None,
) -> None:
    """Write a PEFT adapter folder: adapter_model.safetensors, adapter_config.json, base.json, tokenizer, card.

    `state_dict`: the adapter's tensors (gathered, if they are sharded), named as in the model or as PEFT stores them;
    None takes those of `peft_model`. Raises RuntimeError where they are not exactly the adapter's. `base_name`, a
    hub id or a folder, becomes base_model_name_or_path; `of_base` is what base.json says of it (`read_base`).
    """
    tensors = _adapter_tensors(peft_model, state_dict)
    config: Any = copy.deepcopy(peft_model.peft_config["default"])
    # A relative folder would be found from this working directory alone.
    config.base_model_name_or_path = str(Path(base_name).absolute()) if Path(base_name).is_dir() else base_name
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file every time
    with replacing_folder(folder) as temporary:
        write_tensors(temporary / "adapter_model.safetensors", dict(tensors))
        write_file(temporary / BASE, [f"{json.dumps(of_base, indent=2)}\n".encode()])
        config.save_pretrained(str(temporary))
        base: Any = peft_model.get_base_model()
        write_tokenizer(temporary, tokenizer, base.config.model_type)
        if card is not None:
            write_file(temporary / "README.md", [card.encode()])


def write_full_model(
    folder: Path,
    model: PreTrainedModel,
    state_dict: Mapping[str, Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
) -> None:
    """Write a Hugging Face model folder: sharded safetensors and index, config, generation config, tokenizer.

    `state_dict`: all tensors (gathered, if they are sharded) under the model's own names; None takes those of `model`.
    A head that is tied to the embedding is left out, as transformers does. `dtype`: store floating tensors as.
    Generation ends at the token that ends a turn, and at what ended it before: a base model knows <|endoftext|> alone.
    """
    expected = dict(model.state_dict())
    tensors = dict(expected if state_dict is None else state_dict)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
        expected.pop("lm_head.weight", None)
    _require_same_names("model", tensors, expected)
    config: Any = copy.deepcopy(model.config)
    config.architectures = config.architectures or [type(model).__name__.removeprefix("FSDP")]
    if dtype is not None:
        config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    generation: Any = copy.deepcopy(model.generation_config)
    for written in filter(None, (config, generation)):
        written.eos_token_id = _ending(written.eos_token_id, tokenizer, config.model_type)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_SIZE)
    with replacing_folder(folder) as temporary:
        for file_name, names in split.filename_to_tensors.items():
            write_tensors(temporary / file_name, _cast({name: tensors[name] for name in names}, dtype))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True).encode()
            write_file(temporary / "model.safetensors.index.json", [text])
        config.save_pretrained(str(temporary))
        if generation is not None:
            generation.save_pretrained(str(temporary))
        write_tokenizer(temporary, tokenizer, config.model_type)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, model_type: str) -> None:
    """Write the tokenizer's files and chat_template.jinja into an existing folder; its eos is what ends a turn."""
    if tokenizer.eos_token != FAMILIES[model_type]:  # a base model's
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = FAMILIES[model_type]
    tokenizer.save_pretrained(str(folder))


def _ending(ids: int | list[int] | None, tokenizer: PreTrainedTokenizerBase, model_type: str) -> int | list[int]:
    """Ids that end generation: those that did, and first the one that ends a turn, which training teaches."""
    end: Any = tokenizer.convert_tokens_to_ids(FAMILIES[model_type])
    before = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if end in before:
        return ids  # type: ignore[return-value]  # as it was
    return [end, *before] if before else end


def _adapter_tensors(model: PeftModel, state_dict: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    # save_embedding_layers=False: its "auto" asks the hub for the base's config and could write whole embeddings.
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if state_dict is None:
        return expected
    given = state_dict
    if given.keys() != expected.keys():
        # PEFT drops what does not bear the adapter's name: "q_proj.lora_A.weight" -> "q_proj.lora_A.default.weight".
        full_names = {name.replace(".default.", "."): name for name in model.state_dict()}
        named = {full_names.get(name, name): tensor for name, tensor in state_dict.items()}
        given = get_peft_model_state_dict(model, named, save_embedding_layers=False)
        given |= {name: tensor for name, tensor in named.items() if name not in model.state_dict()}  # to be refused
    _require_same_names("adapter", given, expected)
    return given


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor.detach()
        for name, tensor in tensors.items()
    }


def _require_same_names(what: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise RuntimeError(
            f"export of the {what}: {len(missing)} tensors are missing ({', '.join(missing[:3])}) and {len(unknown)} "
            f"are not the {what}'s ({', '.join(unknown[:3])}); nothing was written"
        )


# The model card ------------------------------------------------------------------------------------------------------


def model_card(
    folder: Path,
    *,
    kind: CardKind,
    method: str,
    base_name: str,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    datasets: Sequence[str] = (),
    lora: Mapping[str, Any] | None = None,
    name: str | None = None,
    weights: str = ".",
) -> str:
    """The text of README.md: front matter for the hub, how to load and serve it, how it was made.

    `folder`: where the card will lie (paths in it are relative to that); `weights`: the weights' folder, seen from
    there. `method`: "SFT" or "DPO". `config`: the resolved config, nested. `facts`: steps, tokens, time, versions ...;
    `metrics`: the last values by full name, None for what was not finite. `datasets`: paths or hub ids of the training
    data. `lora`: r, use_dora of the adapter. The licence is left to the person who publishes.
    """
    base, shown = _portable(base_name, folder), shown_path(base_name)
    title = name or folder.resolve().name
    front: dict[str, Any] = {
        "base_model": shown,
        "base_model_relation": "adapter" if kind == "adapter" else "finetune",
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qwen_train", method.lower()],
    }
    if kind == "adapter":
        front["tags"] += ["lora", f"base_model:adapter:{shown}"]
    hub_datasets = [data for data in datasets if _is_of_hub(data)]
    if hub_datasets:
        front["datasets"] = hub_datasets
    made = {"adapter": "A LoRA adapter for", "merged": "A LoRA adapter merged into", "full": "A fine-tuned version of"}
    rows = {**facts, "data": ", ".join(map(shown_path, datasets)) or "-"}
    # Texts under such names as mean_token_accuracy would be taken for secrets; numbers are not.
    numbers = {key: "-" if value is None else f"{value:.6g}" for key, value in redacted(metrics).items()}
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {title}",
        f"{made[kind]} `{shown}`, trained with {method} by qwen_train. Commands are meant for the folder of this file.",
        "## Load",
        _loading(kind, base, weights),
        "## Serve with vLLM",
        _serving(kind, base, weights, title, lora),
        "## Training",
        _table(("Fact", "Value"), redacted(rows)),
        "## Metrics",
        _table(("Metric", "Value"), numbers) if numbers else "None were taken.",
        "## Config",
        "```yaml\n" + yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True) + "```",
    ]
    return "\n\n".join(parts) + "\n"


def write_model_card(folder: Path, **card: Any) -> None:
    """Write `folder/README.md` atomically; the keyword arguments are those of `model_card`."""
    write_bytes_atomic(folder / "README.md", model_card(folder, **card).encode())


def _loading(kind: CardKind, base: str, weights: str) -> str:
    adapter = kind == "adapter"
    source = base if adapter else weights
    lines = [
        "```python",
        *(["from peft import PeftModel"] if adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{weights}")',
        f'model = AutoModelForCausalLM.from_pretrained("{source}", dtype="auto", device_map="auto")',
        *([f'model = PeftModel.from_pretrained(model, "{weights}")'] if adapter else []),
        'messages = [{"role": "user", "content": "Hello!"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
        f"answer = model.generate(**inputs, max_new_tokens=256{', eos_token_id=tokenizer.eos_token_id' * adapter})",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]
    return "\n".join(lines)


def _serving(kind: CardKind, base: str, weights: str, title: str, lora: Mapping[str, Any] | None) -> str:
    served = re.sub(r"[^A-Za-z0-9._-]+", "-", title)
    if kind != "adapter":
        return f"```bash\nvllm serve {weights} --served-model-name {served}\n```"
    assert lora is not None, "the card of an adapter needs its rank"
    if lora.get("use_dora"):
        return "vLLM does not serve DoRA adapters: write a merged folder with `python launch/merge.py` and serve that."
    r = lora["r"]
    rank = next((value for value in VLLM_RANKS if value >= r), None)
    if rank is None:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this one is {r}: merge it with `python launch/merge.py`."
    command = (
        f"vllm serve {base} --tokenizer {weights} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {served}={weights}"
    )
    note = "" if rank == r else f"\n\nThe adapter's rank is {r}; of the ranks that vLLM takes, {rank} is the next."
    return f"```bash\n{command}\n```{note}"


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    for name, value in rows.items():
        cell = str(value).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {cell} |")
    return "\n".join(lines)


# What may be published -----------------------------------------------------------------------------------------------


def redacted(value: Any, name: str = "") -> Any:
    """A copy fit to be published: what has a secret's name or form is masked, absolute paths keep their last part.

    Tuples become lists and other objects their string, so that YAML and JSON take the result.
    """
    is_number = isinstance(value, bool | int | float)  # eval/logps/chosen_per_token is no secret
    if SECRET_NAME.search(re.sub(r"[-. ]", "_", name.lower())) and not is_number and value not in (None, ""):
        return REDACTED
    if isinstance(value, Mapping):
        return {_scrubbed(str(key)): redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(item) for item in value]
    return value if value is None or is_number else _scrubbed(str(value))


def _scrubbed(text: str) -> str:
    if "\n" not in text and re.match(r"/|~|\.\./\.\./|[A-Za-z]:\\", text):
        text = _last_part(text)  # the whole text is a path: it may hold blanks
    text = ABSOLUTE_PATH.sub(lambda match: _last_part(match[0]), text)
    return SECRET_VALUE.sub(REDACTED, text)


def _last_part(path: str) -> str:
    return Path(path.replace("\\", "/")).name


def _is_of_hub(name: str) -> bool:
    """Whether a source of data is a set on the hub."""
    is_file = Path(name).suffix in (".json", ".jsonl", ".parquet") or Path(name).exists()
    return "/" in name and is_hub_id(name) and not is_file


def shown_path(name: str) -> str:
    """How a card names a path: relative to the working directory; elsewhere `run/adapter`, or the last part alone.

    A hub id stays as it is.
    """
    if not _is_local(name):
        return _scrubbed(name)
    path = Path(name).expanduser().resolve()
    if _is_below_here(path):
        return os.path.relpath(path)
    return f"{path.parent.name}/{path.name}" if (path.parent / "run_id").is_file() else _last_part(name)


def _portable(name: str, folder: Path) -> str:
    """A hub id as it is; a local path as a command in `folder` gives it, unless that led through foreign folders."""
    if not _is_local(name):
        return _scrubbed(name)
    path, folder = Path(name).expanduser().resolve(), folder.resolve()
    relative = os.path.relpath(path, folder)
    beside = not relative.startswith("../..")
    return relative if beside or (_is_below_here(path) and _is_below_here(folder)) else shown_path(name)


def _is_local(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith(("~", ".", "\\")) or Path(name).exists()


def _is_below_here(path: Path) -> bool:
    """Within the working directory, unless that is above the home: the way down would tell whose it is."""
    here = Path.cwd()
    return path.is_relative_to(here) and here not in Path.home().parents
