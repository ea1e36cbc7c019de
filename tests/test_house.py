"""The rules of the house, read off the source: imports point one way, each package has its owner, nothing unpickles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "qwen_train").rglob("*.py"), *(ROOT / "launch").glob("*.py")])

ROWS = [
    (
        "qwen_train",
        "qwen_train.config",
        "qwen_train.config_errors",
        "qwen_train.command_line",
        "qwen_train.loss",
        "qwen_train.data",
    ),
    ("qwen_train.model",),
    ("qwen_train.train",),
    ("qwen_train.output",),
    ("qwen_train.sft", "qwen_train.dpo"),
    ("launch",),
]
SELF_CONTAINED = ("qwen_train.loss", "qwen_train.data.packing")  # torch and numpy, and nothing of ours
OWNERS = {
    "accelerate": ("qwen_train.train.distributed", "qwen_train.train.sharding"),
    "torch.distributed": ("qwen_train.train.distributed", "qwen_train.train.sharding"),
    "peft": ("qwen_train.model", "qwen_train.train.optim", "qwen_train.output"),
    "bitsandbytes": ("qwen_train.model", "qwen_train.train.optim", "qwen_train.output"),
    "flash_attn": ("qwen_train.model.attention", "qwen_train.model.flash4"),
    "tensorboard": ("qwen_train.train.metrics",),
    "torch.utils.tensorboard": ("qwen_train.train.metrics",),
    "datasets": ("qwen_train.data.sources",),
    "jsonargparse": ("qwen_train.command_line",),
}
CAN_RUN_CODE = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def row_of(module: str) -> int:
    """The row whose longest entry holds the module."""
    entries = [(len(entry), index) for index, row in enumerate(ROWS) for entry in row if within(module, entry)]
    return max(entries)[1]


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything a source imports, at its top or deeper; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """What a source does against the rules."""
    tree = ast.parse(source)
    found = []
    for name in imported(tree):
        if within(name, "qwen_train") or within(name, "launch"):
            if row_of(name) > row_of(module):
                found.append(f"{module} imports {name}, of a later row")
            elif any(within(module, alone) and not within(name, alone) for alone in SELF_CONTAINED):
                found.append(f"{module} imports {name}, though it stands for itself")
        for package, owners in OWNERS.items():
            if within(name, package) and not any(within(module, owner) for owner in owners):
                found.append(f"{module} imports {name}, which belongs to {', '.join(owners)}")
        if any(within(name, package) for package in CAN_RUN_CODE):
            found.append(f"{module} imports {name}, which runs code out of files")
        if name in ("torch.load", "torch.save"):
            found.append(f"{module} uses {name}: safetensors and JSON only")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in ("torch.load", "torch.save") or (name.startswith("torch.distributed")):
                allowed = name == "torch.distributed" and any(within(module, o) for o in OWNERS["torch.distributed"])
                if not allowed:
                    found.append(f"{module} uses {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_rules_hold(path: Path):
    assert violations(module_name(path), path.read_text()) == []


def test_all_of_the_house_is_looked_at():
    names = [module_name(path) for path in SOURCES]
    assert {"qwen_train.config", "qwen_train.sft", "qwen_train.train.distributed", "launch.sft"} <= set(names)
    assert {row_of(name) for name in names} == set(range(len(ROWS)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qwen_train.data.stream", "from qwen_train.model.packed import PackedLM"),
        ("qwen_train.config", "from qwen_train.train import optim"),
        ("qwen_train.model.load", "def f():\n    import qwen_train.train.folder"),
        ("qwen_train.train.folder", "from qwen_train.output.export import write_adapter"),
        ("qwen_train.output.result", "from qwen_train import sft"),
        ("qwen_train.sft", "from launch import sft"),
        ("qwen_train.loss.preference", "from qwen_train.config import SFTConfig"),
        ("qwen_train.data.packing", "from qwen_train.data.stream import Stream"),
        ("qwen_train.sft", "from accelerate import Accelerator"),
        ("qwen_train.train.evaluate", "import torch.distributed as dist"),
        ("qwen_train.train.evaluate", "from torch import distributed"),
        ("qwen_train.train.evaluate", "import torch\nx = torch.distributed.get_rank()"),
        ("qwen_train.sft", "from peft import PeftModel"),
        ("qwen_train.train.evaluate", "from bitsandbytes.optim import AdamW8bit"),
        ("qwen_train.model.load", "import flash_attn"),
        ("qwen_train.sft", "from torch.utils.tensorboard import SummaryWriter"),
        ("qwen_train.data.tokenize", "import datasets"),
        ("launch.sft", "import jsonargparse"),
        ("qwen_train.train.checkpoint", "import pickle"),
        ("qwen_train.train.checkpoint", "import torch\nx = torch.load('file')"),
        ("qwen_train.train.checkpoint", "from torch import save"),
    ],
)
def test_a_planted_violation_is_caught(module: str, source: str):
    assert len(violations(module, source)) == 1
    harmless = "import json\nimport torch\nfrom torch import nn\nx = torch.zeros(3)\n"
    assert violations(module, harmless) == []
