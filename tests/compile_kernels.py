"""Compile every Triton kernel for an NVIDIA card that is not there; tests/test_kernels.py starts it.

    python -m tests.compile_kernels 90        (compute capability)

Prints one JSON line a launch: the kernel, bytes of spilt registers and of shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch
import triton
from transformers import Qwen2Config
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qwen_train.model import frozen, kernels, logprobs, triton_kernels
from qwen_train.model.kernel_check import _checks

QWEN_7B = Qwen2Config(
    hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
)
FP8_FROM = 89
BLACKWELL = 100


class Recorder:
    """Stands for a kernel: a launch compiles it, as a real one would, and computes nothing."""

    def __init__(self, kernel: triton.JITFunction, capability: int) -> None:
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid: object) -> "Recorder":
        return self

    def __call__(self, *arguments: object, **options: object) -> None:
        compiled = self.kernel.warmup(*arguments, grid=(1,), **options)
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(compiled.asm["ptx"])
            file.flush()
            arch = re.findall(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)[0]
            nvidia = triton.knobs.nvidia
            ptxas = nvidia.ptxas if self.capability < BLACKWELL else nvidia.ptxas_blackwell
            command = [ptxas.path, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        row = {
            "kernel": self.kernel.__name__,
            "spilt": max(int(count) for count in re.findall(r"(\d+) bytes spill stores", said)),
            "shared": compiled.metadata.shared,
        }
        print(json.dumps(row), flush=True)


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    for name, value in list(vars(triton_kernels).items()):
        if name.endswith("_kernel"):  # not what they call
            setattr(triton_kernels, name, Recorder(value, capability))
    for module in (kernels, frozen, logprobs):
        module.use_kernels = lambda x: True
    cpu = torch.device("cpu")
    checks = list(_checks(QWEN_7B, "none", 64, cpu)) + list(_checks(QWEN_7B, "nf4", 64, cpu))[-1:]
    if capability >= FP8_FROM:
        checks += list(_checks(QWEN_7B, "fp8", 64, cpu))[-1:]
    for _, run in checks:
        run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
