"""The scripts under tests/gpu run, on the CPU and the tiny model, so that no card waits for a typing mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import ROOT, TINY

SMALL = "tokens=2048,steps=2,warm=1,compile=False,rank=4,chunk=64"
CASES = [
    f"sft:{SMALL},sequences=8",
    f"sft:{SMALL},sequences=8,quantization=fp8,off=head+norms,checkpoint=1",
    f"sft:{SMALL},sequences=8,quantization=nf4,off=lora",
    f"sft:{SMALL},sequences=8,full=True,pad=4,off=rows",
    f"dpo:{SMALL},sequences=4",
    f"dpo:{SMALL},sequences=4,reference=precomputed,share=False",
]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/gpu" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.launch
def test_bench(tmp_path: Path):
    for name in ("sft", "dpo"):
        lines = (TINY / f"{name}_train.jsonl").read_text().splitlines()[:100]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = [word for name in ("sft", "dpo") for word in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    done = run("bench.py", "--model", str(TINY / "model"), *files, "--out", str(tmp_path), *CASES)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and [row["case"] for row in rows] == CASES, done.stderr
    assert all(row["tokens_per_second"] > 0 for row in rows), [row.get("error") for row in rows]
    assert rows[4]["step0_gap_per_token"] == 0.0, "policy and reference are one model before the first step"


@pytest.mark.launch
@pytest.mark.parametrize("script", ["ladder.py", "plans.py", "ranks.py"])
def test_the_others_start(script: str):
    done = run(script, "--help")
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
