"""Processes: the start of a run, who this process is, gradients across ranks, global sums, the way out.

All collectives stand here and in sharding.py; what else depends on ranks asks a `Run`. accelerate launches and places
the processes and shards under FSDP2; accumulation, normalisation and the learning rate belong to the loops.
"""

import datetime
import errno
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from torch import Tensor, nn

from qwen_train.model.memory import WHOLE, Sharding
from qwen_train.train.blocks import Shard
from qwen_train.train.peers import Departure, Member, Peers
from qwen_train.train.sharding import (
    check_shardable,
    fill,
    gather,
    judge_launch,
    judge_settings,
    own_part,
    own_shard,
    shard,
)
from qwen_train.train.signals import Signals, asked_of_launcher

if TYPE_CHECKING:
    from qwen_train.config import SFTConfig
    from qwen_train.data.packing import Batch
    from qwen_train.data.stream import MicroBatches
    from qwen_train.model.packed import PackedLM

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
TIMEOUT = datetime.timedelta(minutes=30)  # of a collective: evaluation and saving may keep one rank busy for minutes
PREPARATION_TIMEOUT = datetime.timedelta(hours=24)  # tokenising a large data set, on rank 0
ALL_REDUCE_BYTES = 256 * 2**20


class Run:
    """This process among its ranks.

    rank, world_size, is_main, device as usual; `sharded` under FSDP2. All ranks call its methods together, but for
    `note`, `post`, `posted`, `stop_signal`, `departure` and `close`, which each calls by itself.
    """

    def __init__(self, seed: int, deterministic: bool) -> None:
        self.signals = Signals()
        self.asked_elsewhere = ""
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        judge_launch(int(os.environ.get("WORLD_SIZE", 1)))
        # With `--cpu`, or `distributed_type: MULTI_CPU` without an MPI launcher, accelerate starts one process however
        # many were asked for, and tells it nothing of the others.
        asked = int(os.environ.get("WORLD_SIZE") or asked_of_launcher("num_processes") or 1)
        self.peers = _meet_peers()
        # Mixed precision is our own affair (masters in fp32, compute in bf16), so accelerate's autocast stays off.
        # Without a GPU accelerate must be told of the CPU, or it starts no process group whatever its YAML says.
        self.accelerator = Accelerator(
            mixed_precision="no",
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))  # of them on this machine
        self.is_main = self.rank == 0
        self.device = self.accelerator.device
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        self._notes = judge_settings(self.accelerator)
        self.seed = seed
        self._preparations = 0
        self._keeping: Any = None  # the FSDP2 model whose weights stay whole during a step
        if asked != self.world_size:
            raise ValueError(
                f"accelerate: {asked} processes were asked for and {self.world_size} started; on the CPU use "
                "configs/accelerate/ddp_cpu.yaml"
            )

    def check(self, config: "SFTConfig") -> None:
        """Refuse (ValueError) what cannot be sharded; say what of accelerate's settings is ignored."""
        if self.sharded:
            check_shardable(config)
        self.note(*self._notes)

    def note(self, *messages: str) -> None:
        """Print messages on rank 0."""
        if self.is_main:
            for message in messages:
                print(message, flush=True)

    # -- signals --------------------------------------------------------------------------------------------------

    @property
    def stop_signal(self) -> signal.Signals | None:
        """What this process was asked to leave by."""
        return self.signals.received

    def begin(self) -> None:
        """From here on there is something to save, and a signal is only noted: see `should_stop`."""
        self.signals.is_training = True

    def should_stop(self) -> bool:
        """Whether any rank was asked to leave (a collective, so that all ranks leave together)."""
        asked = int(self.maximum(float(self.rank + 1 if self.stop_signal is not None else 0)))
        if asked and self.stop_signal is None and self.peers is not None:
            self.asked_elsewhere = f", since {self.peers.members[asked - 1]} was told to"
        return asked > 0

    # -- collectives ----------------------------------------------------------------------------------------------

    def sum(self, values: Sequence[float] | Tensor) -> list[float]:
        """Element-wise global sums, in double precision."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def free_memory(self) -> int | None:
        """Bytes free on the fullest of the ranks' GPUs; None on the CPU."""
        if self.device.type != "cuda":
            return None
        return int(-self.maximum(-torch.cuda.mem_get_info(self.device)[0]))

    @property
    def sharding(self) -> Sharding:
        """How the weights of a trained model lie on the GPUs."""
        if not self.sharded:
            return WHOLE
        parallelism, plugin = self.accelerator.parallelism_config, self.accelerator.state.fsdp_plugin
        shards = self.world_size if parallelism is None else int(parallelism.dp_shard_size)
        return Sharding(shards, keeps_weights=not plugin.reshard_after_forward)

    def maximum(self, value: float) -> float:
        """The largest of all ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        largest = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item()

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def spread(self, items: Sequence[A], function: Callable[[list[A]], list[B]]) -> list[B]:
        """`function` of all items, each rank doing its share; the results in the order of the items, on every rank.

        Shares are of the same size, since sharded ranks compute together: the last item may be done several times.
        """
        each = -(-len(items) // self.world_size)
        mine = [min(self.rank + number * self.world_size, len(items) - 1) for number in range(each)]
        shares = self.gather(dict(zip(mine, function([items[index] for index in mine]), strict=True)))
        by_index = {index: result for share in shares for index, result in share.items()}
        return [by_index[index] for index in range(len(items))]

    def from_main(self, function: Callable[[], T]) -> T:
        """`function()`, called on rank 0 alone; its value on every rank."""
        box: list[Any] = [function() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()

    def main_first(self, function: Callable[[], T]) -> T:
        """`function()` on rank 0, then on the first rank of every other machine, then on the rest.

        Those who come later find the result in a cache; a machine that does not share rank 0's makes its own. They ask
        the rendezvous store now and then: a collective's timeout would be too short for a long tokenisation, and a wait
        inside of the store would be deaf to signals.
        """
        self._preparations += 1
        if self.peers is None:
            return function()
        first = self.peers.first_of_machine()
        if not self.is_main:
            self.posted(f"prepared/{self._preparations}/{0 if self.rank == first else first}", PREPARATION_TIMEOUT)
        result = function()
        if self.rank == first:
            self.post(f"prepared/{self._preparations}/{self.rank}", True)
        return result

    def require_alike(self, what: str, value: Any) -> None:
        """Refuse (ValueError) a plain value that is not the same on every rank, such as one of another machine."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                assert self.peers is not None
                raise ValueError(
                    f"{what}: {self.peers.members[rank]} has another than {self.peers.members[0]}; give all "
                    "machines the same files, command line and versions of the packages"
                )

    def post(self, name: str, value: Any) -> None:
        """Leave a JSON value for the other ranks. No collective: from any thread, and without waiting."""
        dist.distributed_c10d._get_default_store().set(self._key(name), json.dumps(value))

    def posted(self, name: str, timeout: datetime.timedelta = TIMEOUT) -> Any:
        """What some rank posts under `name`, as soon as it is there. Raises TimeoutError, and PeerError if one dies."""
        store = dist.distributed_c10d._get_default_store()
        deadline = time.monotonic() + timeout.total_seconds()
        while not store.check([self._key(name)]):
            if self.peers is not None:
                self.peers.check()
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"no word from another rank in {timeout} ({name})")
            time.sleep(0.02)
        return json.loads(store.get(self._key(name)))

    def _key(self, name: str) -> str:
        """Of the store, which a launcher that restarts the processes may keep."""
        return f"qwen_train/{self.peers.token if self.peers else ''}/{name}"

    # -- gradients ------------------------------------------------------------------------------------------------

    def prepare(self, model: "PackedLM") -> "PackedLM":
        """Shard and fill the model under FSDP2; otherwise give every rank rank 0's trained parameters.

        There is no DistributedDataParallel around the model: every micro-batch would run without synchronising, and
        `average_gradients` after the last is all that is needed of it.
        """
        if self.sharded:
            shard(self.accelerator, model)
            if self.sharding.keeps_weights and any(parameter.requires_grad for parameter in model.parameters()):
                self._keeping = model
            else:  # of a frozen model, the reference, there is no backward after which its weights would be let go
                model.set_reshard_after_forward(True)  # type: ignore[operator]
            source, model.source = model.source, None
            fill(model, source, self.device)
        elif self.world_size > 1:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    dist.broadcast(parameter.data, src=0)
        return model

    def accumulate(self, microbatches: "MicroBatches", step: int) -> Iterator["Batch"]:
        """This rank's micro-batches, on the device.

        Dropout is seeded for each of them by (seed, step, micro-batch, rank), so a resumed run draws the same masks
        without any saved generator state. Under FSDP2 with `fsdp_reshard_after_forward: false` the weights, which a
        forward leaves whole, stay so until the step's last backward: not to cast and gather them four times in a step
        of two micro-batches is worth 3.7 % (7B, docs/measured.md).
        """
        for index, batch in enumerate(microbatches.batches):
            if self._keeping is not None:
                self._keeping.set_reshard_after_backward(index + 1 == len(microbatches.batches))
            torch.manual_seed(_seed(self.seed, step, index, self.rank))
            yield batch.to(self.device, non_blocking=True)

    def average_gradients(self, model: nn.Module) -> None:
        """Average the gradients over the ranks, when each has gone through all its micro-batches.

        FSDP2 has reduced them in every backward instead: holding back would keep whole fp32 gradients on each GPU.
        """
        if self.world_size == 1 or self.sharded:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        bucket: list[Tensor] = []
        for position, gradient in enumerate(gradients):
            bucket.append(gradient)
            full = sum(g.numel() * g.element_size() for g in bucket) >= ALL_REDUCE_BYTES
            if full or position + 1 == len(gradients):
                flat = torch.cat([g.flatten() for g in bucket])
                dist.all_reduce(flat)
                flat /= self.world_size
                for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    g.copy_(part.view_as(g))
                bucket = []

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, which the loop has multiplied by world_size, since they are averaged over ranks."""
        loss.backward()

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> float:
        """Global L2 norm of the gradients before clipping to `max_norm` (0: no clipping); the same on every rank."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        max_norm = max_norm or float("inf")
        if all(gradient.dtype == torch.float32 for gradient in gradients):
            return float(self.gather_shards(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
        # Of bf16 gradients torch would give a norm in bf16: 9.5 and then 9.563.
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return float(norm)

    def all_finite(self, tensors: Iterable[Tensor]) -> bool:
        """Whether no value of the tensors is NaN or infinite, on any rank; one wait for the GPU."""
        parts = [part for part in (own_part(tensor.detach()) for tensor in tensors) if part.numel()]
        largest = [torch.linalg.vector_norm(part, math.inf).double() for part in parts]  # NaN if one value is
        finite = not largest or bool(torch.stack(largest).isfinite().all())
        return self.maximum(float(not finite)) == 0

    def gather_shards(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that FSDP2 may have sharded, on every rank."""
        return gather(tensor)

    def own_shard(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Shard:
        """What this rank writes of sharded tensors, by file stem and name."""
        return own_shard(tensors, self.is_main)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, on rank 0; those that FSDP2 has sharded are gathered one by one into its CPU memory."""
        if not self.sharded:
            return dict(tensors)
        gathered: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = self.gather_shards(tensor)
            if self.is_main:
                gathered[name] = full.cpu()
        return gathered

    def departure(self, error: BaseException, told: bool) -> Departure | None:
        """The rank whose going has led to `error`, or to this process being told to leave; None if it is its own error.

        A collective may fail a moment before the connection to the one that has gone breaks.
        """
        by_others = isinstance(error, RuntimeError | TimeoutError) and not isinstance(error, torch.OutOfMemoryError)
        if self.peers is None or not (by_others or told):
            return None
        return self.peers.gone(2.0 if by_others else 0.0)

    def close(self, reason: str = "") -> None:
        """Leave the other ranks; with a reason if they cannot go on either."""
        if self.peers is not None:
            self.peers.close(reason)
            if not reason:
                dist.destroy_process_group()


def _meet_peers() -> Peers | None:
    """The processes that the launcher has started on all machines; None for one alone.

    Before accelerate brings up NCCL or gloo: with a rank that has no GPU that would wait for its timeout. Raises
    ValueError, on every rank alike.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return None
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    device = "cpu" if wants_cpu or not gpus else "cuda"
    if device == "cuda" and local_rank >= gpus:
        device = f"no GPU: {gpus} are visible to process {local_rank + 1} of its machine"
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    peers = Peers(store, rank, world_size, os.environ["MASTER_ADDR"], device)
    check_devices(peers.members)
    return peers


def check_devices(members: Sequence[Member]) -> None:
    """Refuse (ValueError) ranks of which some lack a GPU."""
    for member in members:
        if member.device.startswith("no GPU"):
            raise ValueError(
                f"accelerate: {member} has {member.device}; lower --num_processes, or check CUDA_VISIBLE_DEVICES"
            )
        if member.device != members[0].device:
            raise ValueError(
                f"accelerate: {member} computes on {member.device}, {members[0]} on {members[0].device}; check the "
                "driver and CUDA_VISIBLE_DEVICES of the one without a GPU, or set use_cpu: true for all"
            )


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") % 2**63
