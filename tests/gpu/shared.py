"""Several ranks on one GPU: a script's processes, talking by gloo, since NCCL refuses a GPU that two ranks share.

    torchrun --nproc_per_node 2 tests/gpu/shared.py launch/sft.py ...

Before the first step every rank fills its part of the adapter with numbers of its own, has them saved, zeroes them,
loads them and compares bit by bit. At every step the norm that is logged is compared with that of the gathered
gradients, in double precision. What is found is printed.
"""

import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from qwen_train.model.packed import PackedLM, load_trainable, trainable_parameters
from qwen_train.train import distributed
from qwen_train.train.checkpoint import open_checkpoint, save_checkpoint
from qwen_train.train.distributed import Run
from qwen_train.train.sharding import own_part, read_like

clip, prepare = Run.clip_grad_norm, Run.prepare


def clip_and_compare(run: Run, model: nn.Module, max_norm: float) -> float:
    """The norm that is logged, beside that of the whole gradients, gathered one by one."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    squares = [run.gather_shards(gradient).double().square().sum() for gradient in gradients]
    expected = float(torch.stack(squares).sum().sqrt())
    norm = clip(run, model, max_norm)
    run.note(
        f"gradient norm {norm:.9g}, of the gathered gradients {expected:.9g}: off by {abs(norm / expected - 1):.1e}"
    )
    return norm


@torch.no_grad()
def prepare_and_save(run: Run, model: PackedLM) -> PackedLM:
    """Prepare the model, and see every slice of its adapter through a checkpoint."""
    model = prepare(run, model)
    parameters = trainable_parameters(model)
    if not all("lora_" in name for name in parameters):
        return model
    before = {name: own_part(parameter).clone() for name, parameter in parameters.items()}
    torch.manual_seed(run.rank if run.sharded else 0)  # without shards all ranks have the same
    for parameter in parameters.values():
        own_part(parameter).normal_()
    filled = {name: own_part(parameter).clone() for name, parameter in parameters.items()}
    folder = Path(run.from_main(tempfile.mkdtemp))
    whole = run.whole(parameters)
    run.from_main(lambda: str(save_checkpoint(folder, 1, {"model": whole}, {"run_id": "slices"}, keep=1)))
    for parameter in parameters.values():
        own_part(parameter).zero_()
    reader, _ = open_checkpoint(folder / "step-000001")
    load_trainable(model, {name: read_like(reader, "model", name, parameters[name]) for name in parameters})
    wrong = [name for name, parameter in parameters.items() if not torch.equal(own_part(parameter), filled[name])]
    held = sum(tensor.numel() for tensor in filled.values()) / sum(p.numel() for p in parameters.values())
    found = run.gather(f"{len(wrong)} of {len(filled)} changed, {held:.0%} of the numbers held")
    run.note(f"slices saved, zeroed and loaded, by rank: {'; '.join(found)}")
    for name, parameter in parameters.items():
        own_part(parameter).copy_(before[name])
    return model


def gather_by_cpu(tensor: Tensor) -> Tensor:
    """`sharding.gather`, since gloo's gathering of DTensors crashes on a GPU's."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = init_device_mesh("cpu", tuple(tensor.device_mesh.shape))
    shard = DTensor.from_local(
        tensor.to_local().cpu(), mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return shard.full_tensor().to(tensor.device)


def main() -> None:
    os.environ["LOCAL_RANK"] = "0"  # each is the first of a machine, as it were
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    dist.init_process_group("gloo")
    distributed.gather = gather_by_cpu
    Run.clip_grad_norm, Run.prepare = clip_and_compare, prepare_and_save
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
