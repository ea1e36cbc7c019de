"""Parameter groups, optimizers and schedules. The learning rate is a closed form of the step: nothing to replay.

A new optimizer is one builder in OPTIMIZERS, a new schedule one function in SCHEDULES; the name of either goes into a
Literal of OptimConfig in config.py, too.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw as adamw_update

from qwen_train.config import OptimConfig

ParamGroups = list[dict[str, Any]]
BLOCK_8BIT = 256  # moments that share a scale, in bitsandbytes' kernels
SMALLEST_8BIT = 4096  # elements; below, moments stay in fp32


# Schedules -----------------------------------------------------------------------------------------------------------

# Each gives of the progress after the warm-up, in [0, 1), the share of the way from min_lr_ratio * lr up to lr.


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0: SGDR without restarts (Loshchilov & Hutter 2017, arXiv:1608.03983, Eq. 5)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - progress


def constant(progress: float) -> float:
    """No decay; min_lr_ratio has no effect."""
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "constant": constant}


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of 0-based `step` of `total_steps`, a pure function of its arguments.

    Warm-up takes ceil(warmup_ratio * total_steps) steps and ends at lr; its first step is already above 0. The schedule
    then falls to min_lr_ratio * lr at the end of the last step, so no step is spent at a rate of 0.
    """
    warmup_steps = math.ceil(round(config.warmup_ratio * total_steps, 6))  # 0.07 * 100 is 7.000000000000001
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    factor = SCHEDULES[config.schedule](progress)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * factor)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Use `lr` from the next step on, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# Optimizers ----------------------------------------------------------------------------------------------------------


def param_groups(named_params: Iterable[tuple[str, Tensor]], weight_decay: float) -> ParamGroups:
    """Trainable parameters in two groups: matrices decay; vectors (biases, norm gains, DoRA magnitudes) do not.

    LoRA's A and B are matrices and decay, as in PEFT with a plain AdamW.
    """
    trainable = [param for _, param in named_params if param.requires_grad]
    assert trainable, "nothing to train"
    decayed = [param for param in trainable if param.ndim >= 2]
    others = [param for param in trainable if param.ndim < 2]
    groups: ParamGroups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class WithMasters(Optimizer):
    """An optimizer whose updates go to fp32 masters of the bf16 parameters; fp32 parameters are their own masters.

    Gradients become fp32 `chunk_elements` at a time, so no second full copy of them ever exists. Masters are taken
    from the parameters at the first step, or come with `load_optimizer_state`.
    """

    def __init__(
        self,
        groups: ParamGroups,
        lr: float,
        betas: tuple[float, float],
        chunk_elements: int = 2**26,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})
        self.chunk_elements = chunk_elements

    def _state(self, param: Tensor) -> dict[str, Any]:
        """The parameter's state; begun, with `master` as its last entry, where there is none."""
        state: dict[str, Any] = self.state[param]
        if not state:
            assert param.is_contiguous(), "a flat view must alias the parameter"
            state.update(self._begun(param))
            if param.dtype != torch.float32:
                state["master"] = param.detach().to(torch.float32)
        return state

    def _begun(self, param: Tensor) -> dict[str, Any]:
        """Count and moments before the first step."""
        raise NotImplementedError


class MasterWeights(WithMasters):
    """AdamW for bf16 parameters and gradients, with fp32 masters and moments in its state: 16 bytes a parameter.

    At lr 2e-5 a bf16 weight of size 0.02 (spacing 1.2e-4) never moves by itself; the master does, and the parameter is
    its rounding after every step. Gradients arrive in bf16, summed over micro-batches in bf16.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the masters (Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2) and round the parameters."""
        for group in self.param_groups:
            for chunk in self._chunks(group["params"]):
                params, grads, masters, exp_avgs, exp_avg_sqs, steps = (
                    list(column) for column in zip(*chunk, strict=True)
                )
                adamw_update(
                    masters,
                    [grad.to(torch.float32) for grad in grads],
                    exp_avgs,
                    exp_avg_sqs,
                    [],
                    steps,
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                for param, master in zip(params, masters, strict=True):
                    if param.dtype != torch.float32:
                        param.copy_(master)

    def _chunks(self, params: list[Tensor]) -> Iterator[list[tuple[Tensor, ...]]]:
        """Flat pieces (param, grad, master, exp_avg, exp_avg_sq, step), at most `chunk_elements` elements a chunk."""
        chunk: list[tuple[Tensor, ...]] = []
        room = self.chunk_elements
        for param in params:
            if param.grad is None:
                continue
            state = self._state(param)
            tensors = (param, param.grad, state.get("master", param), state["exp_avg"], state["exp_avg_sq"])
            flat = [tensor.detach().reshape(-1) for tensor in tensors]
            begin = 0
            while begin < param.numel():
                end = min(begin + room, param.numel())
                # The update counts up the step it is given: a copy for each piece, the state's own below.
                chunk.append((*(tensor[begin:end] for tensor in flat), state["step"].clone()))
                room -= end - begin
                begin = end
                if room == 0:
                    yield chunk
                    chunk, room = [], self.chunk_elements
            state["step"] += 1
        if chunk:
            yield chunk

    def _begun(self, param: Tensor) -> dict[str, Any]:
        moments = {name: torch.zeros_like(param, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), dtype=torch.float32, device=param.device), **moments}


class MasterWeights8bit(WithMasters):
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861): 10 bytes a bf16 parameter.

    bitsandbytes' kernels, with fp32 masters for bf16 parameters as in MasterWeights: 2 bytes of weight, 2 of gradient,
    4 of master, 2 of moments (and 8 bytes of scales a block of 256). Tensors below 4,096 elements keep fp32 moments, as
    in bitsandbytes. Entries of the state have its names; the two tables that decode the moments are constants and no
    state.
    """

    def __init__(
        self,
        groups: ParamGroups,
        lr: float,
        betas: tuple[float, float],
        chunk_elements: int = 2**26,
    ) -> None:
        import bitsandbytes.functional  # costs seconds, and only this optimizer needs it

        super().__init__(groups, lr, betas, chunk_elements)
        assert chunk_elements % BLOCK_8BIT == 0, "a scale belongs to one chunk"
        self._kernels = bitsandbytes.functional
        self._tables = [self._kernels.create_dynamic_map(signed) for signed in (True, False)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the masters and round the parameters; of the gradients one chunk at a time exists in fp32."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self._state(param)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        flat = param.detach().view(-1)
        gradient = param.grad.detach().reshape(-1)  # type: ignore[union-attr]
        master = state["master"].view(-1) if "master" in state else flat
        moments = state["state1"].view(-1), state["state2"].view(-1)
        if moments[0].dtype == torch.float32:
            self._kernels.optimizer_update_32bit(
                "adam",
                gradient.to(torch.float32),
                master,
                moments[0],
                beta1,
                group["eps"],
                state["step"],
                group["lr"],
                state2=moments[1],
                beta2=beta2,
                weight_decay=group["weight_decay"],
            )
        else:
            self._tables = [table.to(param.device) for table in self._tables]
            for begin in range(0, param.numel(), self.chunk_elements):
                chunk = slice(begin, begin + self.chunk_elements)
                scales = slice(begin // BLOCK_8BIT, -(-chunk.stop // BLOCK_8BIT))
                self._kernels.optimizer_update_8bit_blockwise(
                    "adam",
                    gradient[chunk].to(torch.float32),
                    master[chunk],
                    moments[0][chunk],
                    moments[1][chunk],
                    beta1,
                    beta2,
                    0.0,  # the third beta and alpha are AdEMAMix's
                    0.0,
                    group["eps"],
                    state["step"],
                    group["lr"],
                    self._tables[0],
                    self._tables[1],
                    state["absmax1"][scales],
                    state["absmax2"][scales],
                    weight_decay=group["weight_decay"],
                )
        if master is not flat:
            flat.copy_(master)

    def _begun(self, param: Tensor) -> dict[str, Any]:
        dtype = torch.uint8 if param.numel() >= SMALLEST_8BIT else torch.float32
        state: dict[str, Any] = {"step": 0}
        for number in (1, 2):
            state[f"state{number}"] = torch.zeros_like(param, dtype=dtype)
            if dtype == torch.uint8:
                blocks = -(-param.numel() // BLOCK_8BIT)
                state[f"absmax{number}"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
        return state


def adamw(groups: ParamGroups, config: OptimConfig) -> Optimizer:
    """Fused AdamW with fp32 moments; bf16 parameters get fp32 masters."""
    if any(param.dtype != torch.float32 for param in _params(groups)):
        return MasterWeights(groups, lr=config.lr, betas=config.betas)
    return AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def adamw_8bit(groups: ParamGroups, config: OptimConfig) -> Optimizer:
    """AdamW with 8-bit moments; bf16 parameters get fp32 masters."""
    return MasterWeights8bit(groups, lr=config.lr, betas=config.betas)


OPTIMIZERS: dict[str, Callable[[ParamGroups, OptimConfig], Optimizer]] = {"adamw": adamw, "adamw_8bit": adamw_8bit}


def build_optimizer(named_params: Iterable[tuple[str, Tensor]], config: OptimConfig) -> Optimizer:
    """The configured optimizer over the trainable parameters."""
    return OPTIMIZERS[config.name](param_groups(named_params, config.weight_decay), config)


def _params(groups: ParamGroups) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


# Their state as flat tensors, for checkpoints without pickle ---------------------------------------------------------

STATELESS = "stateless"


def optimizer_state(optimizer: Optimizer, named_params: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The optimizer's state as `{"<parameter name>/<entry>": tensor}`, exact; the tensors are the live ones.

    A parameter that has not been updated yet has the single entry `stateless`, so that every parameter is accounted
    for. Python integers become int64 scalars. Under FSDP2 the tensors are DTensors. Hyper-parameters are not state:
    they come from the config and the step.
    """
    flat: dict[str, Tensor] = {}
    for name, param in _optimized(optimizer, named_params).items():
        entries: Mapping[str, Any] = optimizer.state.get(param) or {STATELESS: torch.empty(0)}
        for key, value in entries.items():
            flat[f"{name}/{key}"] = value.detach() if isinstance(value, Tensor) else torch.tensor(int(value))
    return flat


def place_masters(params: Mapping[str, Tensor], weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Put the fp32 masters of a checkpoint where this run keeps them; `weights` and `state` (as `optimizer_state`
    gives it) are changed.

    Of bf16 parameters they are entries of the state; FSDP2 has fp32 parameters, which are the masters themselves.
    """
    for name in params.keys() & weights.keys():
        master = f"{name}/master"
        if params[name].dtype == torch.float32:
            weights[name] = state.pop(master, weights[name])
        elif weights[name].dtype == torch.float32 and master not in state and f"{name}/{STATELESS}" not in state:
            state[master] = weights[name]


def load_optimizer_state(
    optimizer: Optimizer, named_params: Iterable[tuple[str, Tensor]], state: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_state` gave, bit for bit; `state` is copied.

    Raises ValueError, before anything changes, if parameters are missing or unknown, entries are not this optimizer's,
    or shapes differ.
    """
    params = _optimized(optimizer, named_params)
    entries: dict[str, dict[str, Tensor]] = {}
    for flat_name, value in state.items():
        name, _, key = flat_name.rpartition("/")
        entries.setdefault(name, {})[key] = value
    missing, unknown = sorted(params.keys() - entries.keys()), sorted(entries.keys() - params.keys())
    if missing or unknown:
        raise ValueError(
            f"optimizer state: {len(missing)} parameters are missing (such as {missing[:1]}) and {len(unknown)} are "
            f"unknown (such as {unknown[:1]}); it was saved by another model or LoRA setting: resume with the same ones"
        )
    for name, param in params.items():
        if entries[name].keys() != {STATELESS}:
            _check_entries(optimizer, name, param, entries[name])
    for name, param in params.items():
        optimizer.state.pop(param, None)
        if entries[name].keys() != {STATELESS}:
            optimizer.state[param] = {key: _restore(param, key, v) for key, v in entries[name].items()}


def _optimized(optimizer: Optimizer, named_params: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The optimizer's parameters by name; every one must have a name."""
    held = {id(param) for param in _params(optimizer.param_groups)}
    named = {name: param for name, param in named_params if id(param) in held}
    assert len(named) == len(held), f"{len(held) - len(named)} optimized parameters have no name (or several)"
    return named


def _check_entries(optimizer: Optimizer, name: str, param: Tensor, entries: Mapping[str, Tensor]) -> None:
    """Refuse the state of another kind of optimizer or of another shape."""
    names = ("state1", "state2") if isinstance(optimizer, MasterWeights8bit) else ("exp_avg", "exp_avg_sq")
    shapes = dict.fromkeys(names, param.shape)
    if isinstance(optimizer, WithMasters) and param.dtype != torch.float32:
        shapes["master"] = param.shape
    if isinstance(optimizer, MasterWeights8bit) and param.numel() >= SMALLEST_8BIT:
        shapes |= dict.fromkeys(("absmax1", "absmax2"), torch.Size([-(-param.numel() // BLOCK_8BIT)]))
    if entries.keys() != {"step", *shapes}:
        raise ValueError(
            f"optimizer state: {name} has {sorted(entries)}, but {type(optimizer).__name__} keeps "
            f"{sorted({'step', *shapes})}; resume with the optim.name and model.dtype it was saved with"
        )
    for key, shape in shapes.items():
        if entries[key].shape != shape:
            raise ValueError(
                f"optimizer state: {name}/{key} has shape {tuple(entries[key].shape)}, the parameter "
                f"{tuple(param.shape)}; resume with the model and LoRA setting it was saved with"
            )


def _restore(param: Tensor, key: str, value: Tensor) -> Tensor | int:
    """A copy of one entry where the optimizer wants it."""
    if key == "step" and value.dtype == torch.int64:
        return int(value)  # bitsandbytes counts in Python
    return value.detach().to(param.device, copy=True)
