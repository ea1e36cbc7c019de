"""flash-attn-4 as an operation, on the CPU: its two functions replaced by loops, and distrusted where they err.

The package itself runs on a GPU alone (tests/test_attention.py, marked gpu).
"""

import errno
import importlib
import os
import sys
import types
import warnings

import pytest
import torch
from transformers import Qwen2Config

from qwen_train.model import attention, kernel_check
from qwen_train.model.attention import check_config
from qwen_train.model.kernel_check import trusted_attention
from tests.test_attention import CASES, max_difference, packed, qkv_of, random_qkv, run_with_grads

CPU = torch.device("cpu")
SHAPE = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


def loop(q, k, v, cu_q, cu_k, scale, aligned_right=True):
    """Segment by segment: q[T, H, E], k and v[K, G, E] -> [T, H, E] and the scores' log-sum-exp [H, T]."""
    outputs, sums = [q[:0]], [q[:0, :, 0].T.float()]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        scores = torch.einsum("qhe,khe->hqk", q[q0:q1].float(), k[k0:k1].float()) * scale
        shift = int((k1 - k0) - (q1 - q0)) if aligned_right else 0
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(shift)
        scores = scores.masked_fill(~seen, float("-inf"))
        outputs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[k0:k1].float()).to(q.dtype))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, 1)


def forward(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse):
    """`_flash_attn_fwd` of 4.0.0b36: five results."""
    assert (
        causal
        and return_lse
        and cu_seqlens_q.diff().max() <= max_seqlen_q
        and cu_seqlens_k.diff().max() <= max_seqlen_k
    )
    return *loop(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), None, None, None


def backward(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, *,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic,
):  # fmt: skip
    """`_flash_attn_bwd`, from what the forward gave."""
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert causal and cu_seqlens_q.diff().max() <= max_seqlen_q <= max_seqlen_k
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
    grads = [torch.zeros_like(x) for x in (q, wide_k, wide_v)]
    for q0, q1, k0, k1 in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False):
        rows, columns = slice(q0, q1), slice(k0, k1)
        scores = torch.einsum("qhe,khe->hqk", q[rows], wide_k[columns]) * softmax_scale
        p = (scores - lse[:, rows, None]).exp().tril(int((k1 - k0) - (q1 - q0)))
        inner = torch.einsum("qhe,khe->hqk", dout[rows], wide_v[columns]) - (dout * out)[rows].sum(-1).T[:, :, None]
        ds = p * inner * softmax_scale
        grads[0][rows] = torch.einsum("hqk,khe->qhe", ds, wide_k[columns])
        grads[1][columns] = torch.einsum("hqk,qhe->khe", ds, q[rows])
        grads[2][columns] = torch.einsum("hqk,qhe->khe", p, dout[rows])
    return grads[0], *(x.unflatten(1, (-1, group)).sum(2) for x in grads[1:])


@pytest.fixture(scope="module")
def stand_in():
    """flash4.py on the loops above."""
    if attention.has_flash4():
        pytest.skip("flash-attn-4 is installed here: the tests marked gpu run the real one")
    names = ["flash_attn", "flash_attn.cute", "flash_attn.cute.interface"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[names[-1]].__dict__.update(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
        yield importlib.import_module("qwen_train.model.flash4")
    sys.modules.pop("qwen_train.model.flash4")


@pytest.mark.parametrize("name", CASES)
def test_the_operation_equals_the_reference(stand_in, name):
    batch = CASES[name]
    qkv = qkv_of(batch)
    expected = run_with_grads(packed(batch), qkv)
    assert max_difference(run_with_grads(packed(batch, "flash4"), qkv), expected) < 1e-5


def test_a_compiled_layer_can_hold_it(stand_in):
    batch = CASES["shared prompts"]
    qkv = random_qkv(len(batch.input_ids))
    attend = torch.compile(packed(batch, "flash4"), fullgraph=True, backend="aot_eager")
    assert max_difference(run_with_grads(attend, qkv), run_with_grads(packed(batch), qkv)) < 1e-5


def test_what_torch_assumes_of_it_is_what_it_gives(stand_in):
    q, k, v = (x[0].transpose(0, 1).contiguous().detach() for x in random_qkv(18))
    cu = torch.tensor([0, 5, 18], dtype=torch.int32)
    rest = (cu, cu, 32, 32, 0.25)
    torch.library.opcheck(stand_in.flash4, (q, k, v, *rest))
    out, lse = stand_in.flash4(q, k, v, *rest)
    torch.library.opcheck(stand_in.flash4_backward, (torch.ones_like(out), q, k, v, out, lse, *rest))


def test_a_deterministic_run_asks_for_its_deterministic_kernels(stand_in):
    torch.use_deterministic_algorithms(True)
    try:
        run_with_grads(packed(CASES["sequences"], "flash4"), random_qkv(18))
    finally:
        torch.use_deterministic_algorithms(False)


def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("where", ["home", "no home", "not writable", "no locks"])
def test_compiled_kernels_are_kept_where_only_the_user_writes(stand_in, monkeypatch, tmp_path, where):
    names = [f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("DIR", "ENABLED")]
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is taken back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    if where == "no home":
        monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what Path.expanduser asks, and refuses
    if where == "not writable":
        (tmp_path / ".cache").write_text("a file")
    if where == "no locks":
        monkeypatch.setattr("fcntl.flock", refuse)
    stand_in._keep_kernels()
    folder = tmp_path / ".cache/qwen_train/flash4"
    assert [os.environ.get(name) for name in names] == ([str(folder), "1"] if where == "home" else [None, None])
    assert where != "home" or folder.stat().st_mode & 0o077 == 0


# --- distrust ---------------------------------------------------------------------------------------------------------


def spoiled(how: str | None):
    """`packed_attention` where torch's kernel is the loop, and flash-attn-4 the loop with one thing wrong."""

    def attend(_module, query, key, value, _mask, *, scaling, packed_backend, packed_cu_q, packed_cu_k, **_):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        theirs = packed_backend == "flash4"
        if theirs and how == "fails":
            raise RuntimeError("No CTK flavor installed: expected one\nand more")
        out, _ = loop(q, k, v, packed_cu_q, packed_cu_k, scaling, aligned_right=not (theirs and how == "alignment"))
        if theirs and how == "many" and len(packed_cu_q) > 257:
            out = out.roll(1, 0)
        if theirs and how == "gradient":
            out = out + 0.1 * (out.sum() - out.sum().detach())
        if theirs and how == "nan":
            out = out * float("nan")
        if theirs and how == "rounding":
            out = out * (1 + 1e-3)
        return out[None], None

    return attend


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """A machine with an H100 and flash-attn-4, whose kernels run on the CPU."""
    for name in ("is_available", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: (9, 0))
    monkeypatch.setattr(attention, "has_flash4", lambda: True)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    monkeypatch.setattr(attention, "_kernel_problem", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def choose(how: str | None, name: str = "auto", config: Qwen2Config = SHAPE, longest: int = 2048) -> str:
        monkeypatch.setattr(kernel_check, "packed_attention", spoiled(how))
        kernel_check._flash4_problem.cache_clear()
        return trusted_attention(name, config, CPU, torch.float32, longest)

    yield choose
    kernel_check._flash4_problem.cache_clear()


@pytest.mark.parametrize("how", ["fails", "alignment", "gradient", "nan", "many"])
def test_where_it_errs_another_kernel_takes_its_place(hopper, monkeypatch: pytest.MonkeyPatch, how: str):
    with pytest.warns(UserWarning, match="model.attention: flash-attn-4 cannot be trusted on this GPU") as caught:
        assert hopper(how) == "varlen"
    message = str(caught[0].message)
    assert "\n" not in message and ("No CTK flavor installed" in message) is (how == "fails")
    assert "torch's varlen kernel takes its place" in message
    monkeypatch.setattr(attention, "flash_attn_varlen_func", lambda *_: None)
    with pytest.warns(UserWarning, match="; flash-attn takes its place"):
        assert hopper(how) == hopper(how, "flash") == "flash"


def test_what_was_asked_for_by_name_is_not_replaced(hopper):
    with pytest.raises(ValueError, match=r"model\.attention: flash-attn-4 cannot be trusted .* mend its installation"):
        hopper("alignment", "flash")


@pytest.mark.parametrize("how", [None, "rounding"])
@pytest.mark.parametrize("longest", [2048, 20])
def test_where_it_is_right_it_stays(hopper, how: str | None, longest: int):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper(how, longest=longest) == hopper(how, "flash", longest=longest) == "flash4"


def test_the_others_are_not_tried(hopper):
    assert [hopper("fails", name) for name in ("varlen", "sdpa")] == ["varlen", "sdpa"]
    dropping = Qwen2Config(**SHAPE.to_diff_dict() | {"attention_dropout": 0.5})
    assert hopper("fails", "auto", dropping) == "varlen", "which then refuses it"
    with pytest.raises(ValueError, match="not supported by flash-attn-4"):
        check_config(dropping, "flash4")
