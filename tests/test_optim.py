"""Optimizers, schedules and the flat optimizer state."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qwen_train.train.optim import (
    OPTIMIZERS,
    SCHEDULES,
    MasterWeights,
    MasterWeights8bit,
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    param_groups,
    place_masters,
    set_learning_rate,
)


def config(**fields) -> SimpleNamespace:
    defaults = dict(name="adamw", lr=2e-5, schedule="cosine", warmup_ratio=0.03, min_lr_ratio=0.1, weight_decay=0.0)
    return SimpleNamespace(**{**defaults, "betas": (0.9, 0.999), "max_grad_norm": 1.0, **fields})


# ---- schedules ----


def test_cosine_by_hand():
    c = config(lr=1.0, warmup_ratio=0.2, min_lr_ratio=0.0)  # 2 warm-up steps, then 8 of cosine
    rates = [learning_rate(c, step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0], abs=1e-12)
    assert rates[6] == pytest.approx(0.5, abs=1e-12)  # half way
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)), abs=1e-12)
    assert rates[9] > 0


def test_linear_and_constant_by_hand():
    linear = config(lr=1.0, schedule="linear", warmup_ratio=0.0, min_lr_ratio=0.5)
    assert [learning_rate(linear, step, 4) for step in range(4)] == pytest.approx([1.0, 0.875, 0.75, 0.625], abs=1e-12)
    constant = config(lr=3.0, schedule="constant", warmup_ratio=0.5, min_lr_ratio=0.1)
    assert [learning_rate(constant, step, 4) for step in range(4)] == [1.5, 3.0, 3.0, 3.0]


def test_after_warmup_cosine_and_linear_are_transformers_own():
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for name, theirs in (("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)):
        scheduler = theirs(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-5), 3, 50)
        factor = scheduler.lr_lambdas[0]
        ours = config(schedule=name, warmup_ratio=0.06, min_lr_ratio=0.0)
        for step in range(3, 50):
            assert learning_rate(ours, step, 50) == pytest.approx(2e-5 * factor(step), abs=1e-12)
        assert learning_rate(ours, 0, 50) > 0 == factor(0)  # theirs spends the first step at 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.07, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 3, 100])
def test_every_step_of_every_schedule_moves(schedule, warmup_ratio, total_steps):
    c = config(schedule=schedule, warmup_ratio=warmup_ratio, min_lr_ratio=0.0)
    rates = [learning_rate(c, step, total_steps) for step in range(total_steps)]
    assert all(0 < rate <= c.lr for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == c.lr
    if warmup_ratio:
        assert peak == math.ceil(warmup_ratio * total_steps - 1e-6) - 1


def test_the_rate_falls_to_its_floor_and_stays_there():
    c = config(lr=1.0, warmup_ratio=0.0, min_lr_ratio=0.1)
    assert learning_rate(c, 10, 10) == pytest.approx(0.1, abs=1e-12)
    assert learning_rate(c, 12, 10) == pytest.approx(0.1, abs=1e-12)


def test_set_learning_rate_reaches_every_group():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model.named_parameters(), config(weight_decay=0.1))
    assert len(optimizer.param_groups) == 2
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


# ---- parameter groups ----


def test_matrices_decay_and_vectors_do_not():
    params = {
        "layer.weight": nn.Parameter(torch.ones(4, 3)),
        "layer.bias": nn.Parameter(torch.ones(4)),
        "norm.weight": nn.Parameter(torch.ones(3)),
        "layer.lora_A.weight": nn.Parameter(torch.ones(2, 3)),
        "frozen.weight": nn.Parameter(torch.ones(4, 3), requires_grad=False),
    }
    decayed, plain = param_groups(params.items(), 0.1)
    assert [id(p) for p in decayed["params"]] == [id(params["layer.weight"]), id(params["layer.lora_A.weight"])]
    assert [id(p) for p in plain["params"]] == [id(params["layer.bias"]), id(params["norm.weight"])]
    optimizer = OPTIMIZERS["adamw"]([decayed, plain], config(lr=0.5, weight_decay=0.1))
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert params["layer.weight"][0, 0].item() == pytest.approx(1 - 0.5 * 0.1)
    assert params["norm.weight"][0].item() == 1.0
    assert len(param_groups([("a", params["layer.weight"])], 0.1)) == 1


def test_betas_reach_the_optimizer_and_adamw_is_fused():
    optimizer = build_optimizer(nn.Linear(3, 2).named_parameters(), config(betas=(0.8, 0.95)))
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["betas"] == (0.8, 0.95) and group["fused"] for group in optimizer.param_groups)


# ---- fp32 masters ----


def train(param: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """A steady pull: one gradient sign all along, sizes of a fine-tuning run."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        param.grad = (1e-3 * (1 + 0.1 * torch.randn(param.shape, generator=generator))).to(param.dtype)
        optimizer.step()


@pytest.fixture(scope="module")
def exact_end() -> tuple[Tensor, Tensor]:
    """Weights of size 0.02 as bf16 holds them, and where 1,000 fp32 steps take them."""
    # They are 2^-13 = 1.2e-4 apart in bf16; an update of 2e-5 is less than half of that.
    start = (0.02 + 0.005 * torch.rand(80, 64, generator=torch.Generator().manual_seed(1))).bfloat16()
    exact = nn.Parameter(start.float())
    train(exact, torch.optim.AdamW([exact], lr=2e-5, weight_decay=0.0), 1000)
    return start, exact.detach()


def test_bf16_swallows_small_updates(exact_end):
    """The negative control of the next: a thousand steps, not one bit."""
    start, _ = exact_end
    alone = nn.Parameter(start.clone())
    train(alone, torch.optim.AdamW([alone], lr=2e-5, weight_decay=0.0), 1000)
    assert torch.equal(alone.detach(), start)


@pytest.mark.parametrize(("name", "kind"), [("adamw", MasterWeights), ("adamw_8bit", MasterWeights8bit)])
def test_masters_keep_small_updates(exact_end, name, kind):
    start, exact = exact_end
    mastered = nn.Parameter(start.clone())
    optimizer = build_optimizer([("w", mastered)], config(name=name))
    assert type(optimizer) is kind
    train(mastered, optimizer, 1000)
    moved = exact - start.float()
    assert moved.mean().item() == pytest.approx(-0.02, rel=0.01)
    master = optimizer.state[mastered]["master"]
    tolerance = 0.01 if name == "adamw" else 0.06  # gradients were rounded to bf16, moments to 8 bits (4.6 % seen)
    assert (master - exact).abs().max() < tolerance * moved.abs().min()
    assert (master - exact).mean().abs() < 0.01 * moved.abs().mean()
    assert torch.equal(mastered.detach(), master.bfloat16())
    assert mastered.dtype == torch.bfloat16


@pytest.mark.parametrize("chunk_elements", [1, 7, 64, 2**26])
def test_masters_are_adamw_bit_for_bit_however_chunked(chunk_elements):
    exact = chunk_elements % 64 == 0  # pieces shorter than a vector register are rounded by scalar code
    torch.manual_seed(0)
    shapes = [(5, 9), (3,), (8, 8), (40,)]
    params = [nn.Parameter((0.1 * torch.randn(shape)).bfloat16()) for shape in shapes[:3]]
    params.append(nn.Parameter(torch.randn(shapes[3])))  # an fp32 parameter passes straight through
    plain = [nn.Parameter(param.detach().float()) for param in params]
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
    plain_groups = [{"params": plain[:2], "weight_decay": 0.1}, {"params": plain[2:], "weight_decay": 0.0}]
    ours = MasterWeights(groups, lr=1e-3, betas=(0.9, 0.99), chunk_elements=chunk_elements)
    theirs = torch.optim.AdamW(plain_groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    for step in range(20):
        for param, twin in zip(params, plain, strict=True):
            param.grad = torch.randn(param.shape).to(param.dtype)
            twin.grad = param.grad.float()
        if step == 5:  # a parameter without a gradient is left alone
            params[1].grad = plain[1].grad = None
        set_learning_rate(ours, 1e-3 / (step + 1))
        set_learning_rate(theirs, 1e-3 / (step + 1))
        ours.step()
        theirs.step()
    for param, twin in zip(params, plain, strict=True):
        master = ours.state[param].get("master", param)
        torch.testing.assert_close(master, twin, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-9)
        assert torch.equal(param.detach(), master.detach().to(param.dtype))
        assert ours.state[param]["step"].item() == theirs.state[twin]["step"].item()
    assert "master" not in ours.state[params[3]]


def test_no_chunk_of_fp32_gradients_is_larger_than_asked():
    params = [nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in (1000, 3, 64, 129)]
    optimizer = MasterWeights([{"params": params}], lr=1e-3, betas=(0.9, 0.99), chunk_elements=64)
    for param in params:
        param.grad = torch.ones_like(param)
    sizes = [sum(piece[1].numel() for piece in chunk) for chunk in optimizer._chunks(params)]
    assert max(sizes) == 64 and sum(sizes) == 1196 and len(sizes) == math.ceil(1196 / 64)


def test_masters_take_16_bytes_a_parameter():
    param = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = MasterWeights([{"params": [param]}], lr=1e-3, betas=(0.9, 0.99))
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = [param, param.grad, *optimizer.state[param].values()]
    assert sum(t.numel() * t.element_size() for t in held) == 16 * param.numel() + 4  # and the step count


# ---- 8 bits ----


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_elements", [256, 2**26])
def test_8_bits_are_bitsandbytes_own_bit_for_bit_however_chunked(device, dtype, chunk_elements):
    """On fp32 copies of the same weights; 4,095 elements keep fp32 moments, and the last block may be short."""
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    shapes = [(5, 9), (4095,), (4096,), (70, 131)]
    params = [nn.Parameter((0.02 * torch.randn(shape, device=device)).to(dtype)) for shape in shapes]
    twins = [nn.Parameter(param.detach().float()) for param in params]

    def groups(held: list[nn.Parameter]) -> list[dict]:
        return [{"params": held[:2], "weight_decay": 0.1}, {"params": held[2:], "weight_decay": 0.0}]

    ours = MasterWeights8bit(groups(params), lr=1e-3, betas=(0.9, 0.99), chunk_elements=chunk_elements)
    theirs = AdamW8bit(groups(twins), lr=1e-3, betas=(0.9, 0.99))
    for step in range(20):
        for param, twin in zip(params, twins, strict=True):
            param.grad = 1e-3 * torch.randn_like(param)
            twin.grad = param.grad.float()
        if step == 5:  # a parameter without a gradient is left alone
            params[1].grad = twins[1].grad = None
        set_learning_rate(ours, 1e-3 / (step + 1))
        set_learning_rate(theirs, 1e-3 / (step + 1))
        ours.step()
        theirs.step()
    for param, twin in zip(params, twins, strict=True):
        state, expected = ours.state[param], theirs.state[twin]
        assert torch.equal(state.get("master", param), twin)
        assert torch.equal(param.detach(), twin.detach().to(dtype)) and ("master" in state) == (dtype != torch.float32)
        names = set(expected) - {"qmap1", "qmap2"}
        assert set(state) - {"master"} == names
        assert state["step"] == expected["step"] and all(
            torch.equal(state[name], expected[name]) for name in names - {"step"}
        )
    assert [ours.state[param]["state1"].dtype for param in params] == [torch.float32] * 2 + [torch.uint8] * 2


def test_8_bit_masters_take_10_bytes_a_parameter():
    param = nn.Parameter(torch.zeros(256, 64, dtype=torch.bfloat16))
    optimizer = build_optimizer([("w", param)], config(name="adamw_8bit"))
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = [param, param.grad, *(value for value in optimizer.state[param].values() if isinstance(value, Tensor))]
    assert sum(t.numel() * t.element_size() for t in held) == 10 * param.numel() + 8 * param.numel() // 256


# ---- state ----


def make(kind: str, device: str = "cpu") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(70, 64), nn.Linear(64, 2)).to(device)
    if kind.endswith("masters"):
        model = model.bfloat16()
    name = "adamw_8bit" if kind.startswith("adamw_8bit") else "adamw"
    return model, build_optimizer(model.named_parameters(), config(name=name, lr=1e-2, weight_decay=0.1))


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(5, 70, generator=torch.Generator().manual_seed(step))
        model(inputs.to(next(model.parameters()))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.gpu
def test_masters_on_a_gpu_are_fused_adamw():
    torch.manual_seed(0)
    param = nn.Parameter((0.1 * torch.randn(300, 257, device="cuda")).bfloat16())
    twin = nn.Parameter(param.detach().float())
    ours = MasterWeights([{"params": [param]}], lr=1e-3, betas=(0.9, 0.99), chunk_elements=2**12)
    theirs = torch.optim.AdamW([twin], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for _ in range(20):
        param.grad = torch.randn_like(param)
        twin.grad = param.grad.float()
        ours.step()
        theirs.step()
    torch.testing.assert_close(ours.state[param]["master"], twin.detach(), rtol=1e-6, atol=1e-9)
    assert torch.equal(param.detach(), ours.state[param]["master"].bfloat16())
    state = {key: value.cpu() for key, value in optimizer_state(ours, [("w", param)]).items()}
    load_optimizer_state(ours, [("w", param)], state)
    assert all(value.is_cuda for value in ours.state[param].values())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["adamw", "masters", "adamw_8bit", "adamw_8bit masters"])
def test_state_goes_through_safetensors_bit_for_bit(kind, device, tmp_path):
    from safetensors.torch import load_file, save_file

    straight, optimizer = make(kind, device)
    run_steps(straight, optimizer, 0, 4)
    save_file({k: v.contiguous() for k, v in straight.state_dict().items()}, tmp_path / "model.safetensors")
    save_file(optimizer_state(optimizer, straight.named_parameters()), tmp_path / "optimizer.safetensors")
    run_steps(straight, optimizer, 4, 8)

    resumed, fresh = make(kind, device)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    load_optimizer_state(fresh, resumed.named_parameters(), load_file(tmp_path / "optimizer.safetensors"))
    run_steps(resumed, fresh, 4, 8)
    for param, twin in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(param, twin)
    expected = optimizer_state(optimizer, straight.named_parameters())
    got = optimizer_state(fresh, resumed.named_parameters())
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) and expected[key].dtype == got[key].dtype for key in expected)
    assert type(fresh.state[resumed[0].weight]["step"]) is type(optimizer.state[straight[0].weight]["step"])

    # Negative control: without the state the same weights go elsewhere.
    forgetful, empty = make(kind, device)
    forgetful.load_state_dict(load_file(tmp_path / "model.safetensors"))
    run_steps(forgetful, empty, 4, 8)
    assert any(not torch.equal(p, q) for p, q in zip(straight.parameters(), forgetful.parameters(), strict=True))


@pytest.mark.parametrize(("saved", "resumed"), [("masters", "adamw"), ("adamw", "masters"), ("masters", "masters")])
def test_masters_keep_their_bits_whichever_form_goes_on(saved, resumed):
    """bf16 parameters with masters (one process) and fp32 parameters (FSDP2) go on from each other's state."""
    model, optimizer = make(saved)
    run_steps(model, optimizer, 0, 4)
    state = optimizer_state(optimizer, model.named_parameters())
    masters = {name: state.get(f"{name}/master", param.detach()) for name, param in model.named_parameters()}
    other, fresh = make(resumed)
    params = dict(other.named_parameters())
    weights, values = model.state_dict(), dict(state)
    place_masters(params, weights, values)
    other.load_state_dict(weights)
    load_optimizer_state(fresh, params.items(), values)
    for name, param in params.items():
        found = fresh.state[param].get("master", param.detach())
        assert found.dtype == torch.float32 and torch.equal(found, masters[name]), name
        assert torch.equal(param, masters[name].to(param.dtype)), name
    assert ("0.weight/master" in values) is (resumed == "masters")
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values()), "rounding would show"


def test_loading_copies():
    model, optimizer = make("adamw")
    run_steps(model, optimizer, 0, 2)
    state = {key: value.clone() for key, value in optimizer_state(optimizer, model.named_parameters()).items()}
    before = {key: value.clone() for key, value in state.items()}
    load_optimizer_state(optimizer, model.named_parameters(), state)
    run_steps(model, optimizer, 2, 4)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_a_parameter_without_state_is_accounted_for():
    model, optimizer = make("adamw")
    model[1].requires_grad_(False)  # never gets a gradient
    run_steps(model, optimizer, 0, 2)
    state = optimizer_state(optimizer, model.named_parameters())
    assert [key for key in state if key.startswith("1.")] == ["1.weight/stateless", "1.bias/stateless"]
    load_optimizer_state(optimizer, model.named_parameters(), state)
    assert not optimizer.state.get(model[1].weight) and optimizer.state[model[0].weight]["step"].item() == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if not k.startswith("0.bias/")}, "1 parameters are missing.*0.bias"),
        (lambda s: {**s, "2.weight/step": torch.zeros(())}, "1 are unknown.*2.weight"),
        (lambda s: {k: v for k, v in s.items() if k != "0.bias/exp_avg"}, "0.bias has .* AdamW keeps"),
        (lambda s: {**s, "0.bias/master": torch.zeros(64)}, "0.bias has .* AdamW keeps"),
        (lambda s: {**s, "0.weight/exp_avg_sq": torch.zeros(70, 64)}, r"0.weight/exp_avg_sq has shape \(70, 64\)"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, message):
    model, optimizer = make("adamw")
    run_steps(model, optimizer, 0, 2)
    state = {key: value.clone() for key, value in optimizer_state(optimizer, model.named_parameters()).items()}
    with pytest.raises(ValueError, match=message):
        load_optimizer_state(optimizer, model.named_parameters(), damage(state))
    after = optimizer_state(optimizer, model.named_parameters())
    assert all(torch.equal(after[key], state[key]) for key in state)
    load_optimizer_state(optimizer, model.named_parameters(), state)  # undamaged, it loads


def test_state_of_another_optimizer_is_refused():
    model, optimizer = make("masters")
    run_steps(model, optimizer, 0, 1)
    state = optimizer_state(optimizer, model.named_parameters())
    plain, plain_optimizer = make("adamw")
    with pytest.raises(ValueError, match=r"resume with the optim\.name"):
        load_optimizer_state(plain_optimizer, plain.named_parameters(), state)
