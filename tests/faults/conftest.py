"""For the fault tests: another disk under everything that a run writes."""

from collections.abc import Callable

import pytest

from qwen_train.train import files


@pytest.fixture
def put_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[files.Disk], files.Disk]:
    """put_disk(disk): from now on, to the end of the test, files are written through it."""

    def put(disk: files.Disk) -> files.Disk:
        monkeypatch.setattr(files, "disk", disk)
        return disk

    return put
