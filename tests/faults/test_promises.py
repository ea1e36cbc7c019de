"""docs/reliability.md: the tests it names are there, and break things as often as it says."""

import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_train.train import files
from tests.faults.saves import WAYS, names, save
from tests.faulty_disk import FaultyDisk
from tests.scripts import ROOT
from tests.test_docs import rows_of

TEXT = (ROOT / "docs/reliability.md").read_text()
NAMED = [(cells[1], cells[2]) for cells in rows_of(TEXT, "Promise")]
EXISTING = {"new": (1,), "again": (1, 2)}


def function(named: str) -> Callable[..., Any]:
    path, name = named.split("::")
    return getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)


def parameters(named: str) -> list[list[Any]]:
    """The values of each parametrization of a test; marks taken off."""
    marks = [mark for mark in getattr(function(named), "pytestmark", []) if mark.name == "parametrize"]
    return [[getattr(value, "values", (value,)) for value in mark.args[1]] for mark in marks]


def operations(folder: Path, way: str, existing: tuple[int, ...], only: tuple[str, ...] = ()) -> int:
    """How often a save of step 2 reaches the disk."""
    for step in existing:
        save(folder, step)
    counter = FaultyDisk(only=only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "disk", counter)
        WAYS[way](folder, 2, keep=1)
    return len(counter.names)


def of_all_ways(folder: Path, **how: Any) -> int:
    return sum(operations(folder / way / key, way, old, **how) for way in WAYS for key, old in EXISTING.items())


def files_of(folder: Path, way: str) -> list[int]:
    path = WAYS[way](folder / way, 1)
    return [(path / name).stat().st_size for name in names(path)]


def examples(named: str) -> int:
    """Of a fuzzing test: its last parameter is how many."""
    return sum(values[-1] for values in parameters(named)[0])


# Where a test breaks things in a loop of its own; elsewhere a case is a run of the test.
COUNTS: dict[str, Callable[[str, Path], int]] = {
    "test_kill_9_at_every_operation_of_a_save": lambda _, folder: of_all_ways(folder),
    "test_an_error_of_any_operation_leaves_a_whole_checkpoint": lambda _, folder: of_all_ways(folder),
    "test_power_loss_at_every_operation_of_a_save": lambda _, folder: sum(
        operations(folder / way, way, (1,)) for way in WAYS
    ),
    "test_no_space_at_every_write_leaves_the_previous_checkpoint": lambda _, folder: sum(
        operations(folder / way, way, (), only=("write",)) for way in WAYS
    ),
    "test_damage_to_any_file_is_found_named_and_fallen_back_from": lambda named, folder: (
        len(parameters(named)[0]) * sum(len(files_of(folder, way)) for way in WAYS)
    ),
    "test_no_byte_of_a_checkpoint_can_change_unseen": lambda named, folder: sum(
        sum(files_of(folder, way)) for (way,) in parameters(named)[0]
    ),
    "test_small_files_are_old_or_new_whatever_happens": lambda _, __: 2 * 5,  # killed and refused at 5 operations
    "test_a_start_that_was_killed_anywhere_is_made_up_for": lambda _, __: 1 + 3 * 5,  # the folder, three small files
    "test_a_run_that_goes_back_leaves_no_hole_in_its_log": lambda _, __: 2 * 3 + 5,  # two renamed, the log cut
    "test_damage_to_any_rank_s_file_is_found_and_fallen_back_from": lambda named, _: 6 * len(parameters(named)[0]),
    "test_spoilt_rows_are_refused_or_rightly_masked": lambda named, _: examples(named),
    "test_spoilt_configs_load_or_are_refused": lambda named, _: examples(named),
}


@pytest.mark.parametrize(("named", "cases"), NAMED, ids=[named.split("::")[-1] for named, _ in NAMED])
def test_a_promise_is_held_as_often_as_it_says(named: str, cases: str, tmp_path: Path):
    assert callable(function(named))
    if cases:
        count = COUNTS.get(named.split("::")[1], lambda named, _: math.prod(len(v) for v in parameters(named)))
        assert int(cases) == count(named, tmp_path)


def test_every_fault_test_is_in_the_table_or_tests_a_tool():
    """A promise that nobody reads is none: the files of tests/faults/ are named, each at least once."""
    held = {named.split("::")[0] for named, _ in NAMED}
    written = {f"tests/faults/{path.name}" for path in (ROOT / "tests/faults").glob("test_*.py")}
    assert written - held == {"tests/faults/test_promises.py"}
    assert {*COUNTS} <= {named.split("::")[1] for named, _ in NAMED}
    with pytest.raises(AttributeError):
        function("tests/faults/test_save.py::test_that_is_not_there")
    assert re.search(r"^## What is not promised$", TEXT, re.MULTILINE)
