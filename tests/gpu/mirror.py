"""One rank of two under FSDP2 on one GPU: its compute, its memory and its kernels, without the exchange.

    python tests/gpu/mirror.py --config configs/sft_qwen2.5_7b_full.yaml [launch/plan.py's other options]

The other rank is a mirror: gathering repeats this rank's shard, and reducing keeps its own part, each as a copy on the
GPU. What two GPUs lose to the exchange is not in these figures, which bound theirs from above.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from qwen_train.train import distributed

ROOT = Path(__file__).parents[2]
RANKS = 2


def repeat(output: Tensor, own: Tensor, *_: Any, **__: Any) -> None:
    """all_gather_into_tensor: every rank's part is this one's, which may lie in its place already."""
    for part in output.view(RANKS, -1):
        if part.data_ptr() != own.data_ptr():
            part.copy_(own.view(-1))


def keep(output: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
    """reduce_scatter_tensor: the mean over ranks of which each has the same."""
    output.view(-1).copy_(input.view(RANKS, -1)[0])


def main() -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost"}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ.setdefault("FSDP_RESHARD_AFTER_FORWARD", "true")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    # As torch 2.11 and 2.13 call them.
    dist.all_gather_into_tensor = dist.all_gather_single = repeat
    dist.reduce_scatter_tensor = dist.reduce_scatter_single = keep
    distributed._meet_peers = lambda: None  # there is nobody to wait for
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    sys.argv = [str(ROOT / "launch/plan.py"), *sys.argv[1:], "--measure"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
