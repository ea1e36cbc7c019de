"""status.json in the folder of a run: how the run stands, for schedulers and the next start."""

import json
import os
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwen_train.train.files import finite, write_json_atomic

STATUS = "status.json"
STARTED = uuid.uuid4().hex
OUTCOMES = ("running", "finished", "interrupted", "refused", "failed")


def write_status(folder: Path, outcome: str, reason: str = "", step: int | None = None, **facts: Any) -> None:
    """Write `status.json` atomically: outcome (one of `OUTCOMES`), reason, step, time (UTC), pid, further facts.

    `process` tells the writer from all others (`this_process`).
    """
    assert outcome in OUTCOMES, outcome
    status = {
        "outcome": outcome,
        "reason": reason,
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "process": this_process(),
    }
    write_json_atomic(folder / STATUS, finite({**status, "pid": os.getpid(), **facts}))


def read_status(folder: Path) -> dict[str, Any]:
    """What `write_status` wrote; empty if there is none, or it is not ours: as good as interrupted."""
    try:
        status = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def this_process() -> str:
    """A name that no other process has: process numbers repeat on other machines and in other containers."""
    return f"{STARTED}-{os.getpid()}"  # a fork has a number of its own


def is_ours(folder: Path) -> bool:
    """Whether this process has taken the folder of a run over."""
    return read_status(folder).get("process") == this_process()
