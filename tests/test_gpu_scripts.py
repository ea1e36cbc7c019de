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


@pytest.mark.launch
def test_a_mirror_of_one_rank():
    done = run("mirror.py", "--config", str(TINY / "sft.yaml"), "--lora.enabled=false", "--steps=1", "--json")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and json.loads(line)["measured"]["world_size"] == 2, done.stderr


@pytest.mark.launch
@pytest.mark.ranks
def test_ranks_that_share_a_device(tmp_path: Path):
    (tmp_path / "small").symlink_to(TINY / "model")
    (tmp_path / "sft.jsonl").symlink_to(TINY / "sft_train.jsonl")
    folders = ("--data", str(tmp_path), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    done = run("ranks.py", *folders, "--gpus", "1", "--shared", "--only", "small-lora-1", "small-lora-ddp2")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    one, two, comparison, _ = rows
    assert one["steps"] == two["steps"] == comparison["steps"] == 12, done.stderr
    assert two["norms_compared"] >= 11 and two["norms_off_at_most"] <= 1e-6
    assert two["slices"][0].count("0 of 28 changed") == 2
    assert comparison["largest_norm_difference"] <= 0.01
