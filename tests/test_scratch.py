"""Temporary folders of the caches: whoever finds one deletes it, unless somebody works in it."""

import fcntl
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwen_train.data.scratch import beside, clean_scratch, scratch_folder


@pytest.mark.parametrize(("module", "name"), [(os, "open"), (fcntl, "flock")], ids=["unopened", "unlocked"])
def test_a_folder_that_is_found_before_it_is_locked_is_made_again(
    module: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By another process, which looks for leftovers just after the folder was made."""
    found: list[list[Path]] = []
    real = getattr(module, name)

    def late(*arguments: Any) -> Any:
        monkeypatch.undo()
        found.append(clean_scratch(tmp_path))
        return real(*arguments)

    monkeypatch.setattr(module, name, late)
    with scratch_folder(tmp_path / "x") as folder:
        assert [len(left) for left in found] == [1] and folder.is_dir() and folder != found[0][0]
        assert clean_scratch(tmp_path) == [], "somebody works in it"
    beside(tmp_path / "x").mkdir()
    assert len(clean_scratch(tmp_path)) == 1 and list(tmp_path.iterdir()) == []
