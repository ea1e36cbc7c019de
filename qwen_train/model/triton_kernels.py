"""The Triton code of kernels.py, which launches it and says what each kernel is for: importable where triton is.

Sizes in capitals are fixed when a kernel is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def round_rows_kernel(x, values, scale, columns, largest, BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if WHOLE:
        mask = column < columns
        data = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        factor = tl.maximum(tl.max(tl.abs(data), axis=0), 1e-12) / largest
        tl.store(values + row * columns + column, (data / factor).to(tl.float8e4nv), mask=mask)
    else:
        most = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, columns, BLOCK):
            mask = start + column < columns
            data = tl.load(x + row * columns + start + column, mask=mask, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(data))
        factor = tl.maximum(tl.max(most, axis=0), 1e-12) / largest
        for start in range(0, columns, BLOCK):
            mask = start + column < columns
            data = tl.load(x + row * columns + start + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(values + row * columns + start + column, (data / factor).to(tl.float8e4nv), mask=mask)
    tl.store(scale + row, factor)


@triton.jit
def dequantize_nf4_kernel(packed, absmax, scales, code, offset, values, out, num_bytes, BLOCKS: tl.constexpr):  # noqa: N803
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # of 32 bytes, 64 values
    inside = block * 32 < num_bytes
    index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(code + index) * tl.load(scales + block // 256, mask=inside, other=0.0) + tl.load(offset)
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(packed + place, mask=place < num_bytes, other=0).to(tl.int32)
    first = tl.load(values + (byte >> 4)) * scale[:, None]
    second = tl.load(values + (byte & 15)) * scale[:, None]
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    both = tl.interleave(first, second).to(out.dtype.element_ty)
    tl.store(out + place, both, mask=place < 2 * num_bytes)


@triton.jit
def _silu_product(gate, up, kind: tl.constexpr):
    """silu(gate) * up of fp32 values, rounded to `kind` after silu too, as transformers does."""
    silu = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32)
    return (silu * up).to(kind)


@triton.jit
def _silu_product_gradients(grad, gate, up):
    """Gradients of gate and up, from that of silu(gate) * up; all fp32."""
    sigmoid = tl.sigmoid(gate)
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


@triton.jit
def _halves(table, place, half, inside):
    """The two halves of a row of cos or sin, fp32."""
    first = tl.load(table + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(table + place + half, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def swiglu_kernel(gate_up, out, features, out_stride, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < features
    gate = tl.load(gate_up + row * 2 * features + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * features + features + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, _silu_product(gate, up, out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(grad, gate_up, out, features, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < features
    g = tl.load(grad + row * features + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * features + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * features + features + column, mask=mask, other=0.0).to(tl.float32)
    grad_gate, grad_up = _silu_product_gradients(g, gate, up)
    tl.store(out + row * 2 * features + column, grad_gate.to(out.dtype.element_ty), mask=mask)
    tl.store(out + row * 2 * features + features + column, grad_up.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])  # the number of tokens would compile it again mid-run
def swiglu_low_kernel(
    gate_up, low, b, out, rows, features, low_stride, b_width, out_stride, gate_rank, up_rank,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,  # noqa: N803
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inner = tl.arange(0, RANK)
    in_rows, in_columns = (row < rows)[:, None], (column < features)[None, :]
    mask = in_rows & in_columns
    kind = out.dtype.element_ty
    place = gate_up + row[:, None] * 2 * features + column[None, :]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + features, mask=mask, other=0.0).to(tl.float32)

    left = low + row[:, None] * low_stride + inner[None, :]
    right = b + column[None, :].to(tl.int64) * b_width + inner[:, None]
    small = tl.load(left, mask=in_rows & (inner < gate_rank)[None, :], other=0.0)
    wide = tl.load(right, mask=in_columns & (inner < gate_rank)[:, None], other=0.0)
    gate = (gate + tl.dot(small, wide, input_precision="ieee")).to(kind)
    tl.store(place, gate, mask=mask)
    small = tl.load(left + gate_rank, mask=in_rows & (inner < up_rank)[None, :], other=0.0)
    wide = tl.load(right + features * b_width + gate_rank, mask=in_columns & (inner < up_rank)[:, None], other=0.0)
    up = (up + tl.dot(small, wide, input_precision="ieee")).to(kind)
    tl.store(place + features, up, mask=mask)

    place = out + row[:, None] * out_stride + column[None, :]
    tl.store(place, _silu_product(gate.to(tl.float32), up.to(tl.float32), kind), mask=mask)


@triton.jit
def _scaled_block(b, row, column, rows, columns, scale):
    """scale * b[rows, columns] at (row, column), 0 outside of it; fp32."""
    mask = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None, :]
    return tl.load(b + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32) * scale


@triton.jit
def round_adapters_kernel(
    a0, a1, a2, b0, b1, b2, out_a, out_b, columns, chunks, a_programs,
    rank0, rank1, rank2, height0, height1, height2, b_stride, scale,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    program = tl.program_id(0)
    if program < a_programs:  # part of a row of the stacked A's
        row = program // chunks
        column = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        first, second = row - rank0, row - rank0 - rank1
        data = tl.load(a0 + row * columns + column, mask=inside & (row < rank0), other=0.0).to(tl.float32)
        is_second = inside & (first >= 0) & (second < 0)
        data += tl.load(a1 + first * columns + column, mask=is_second, other=0.0).to(tl.float32)
        data += tl.load(a2 + second * columns + column, mask=inside & (second >= 0), other=0.0).to(tl.float32)
        tl.store(out_a + row * columns + column, data.to(out_a.dtype.element_ty), mask=inside)
    else:  # rows of the block-diagonal s B
        line = (program - a_programs) * ROWS + tl.arange(0, ROWS)
        inner = tl.arange(0, RANK)
        block = _scaled_block(b0, line, inner, height0, rank0, scale)
        block += _scaled_block(b1, line - height0, inner - rank0, height1, rank1, scale)
        block += _scaled_block(b2, line - height0 - height1, inner - rank0 - rank1, height2, rank2, scale)
        mask = (line < height0 + height1 + height2)[:, None] & (inner < rank0 + rank1 + rank2)[None, :]
        place = out_b + line.to(tl.int64)[:, None] * b_stride + inner[None, :]
        tl.store(place, block.to(out_b.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def swiglu_low_backward_kernel(
    grad, gate_up, grad_low, a, out, rows, features, low_stride, rank,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,  # noqa: N803
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inner = tl.arange(0, RANK)
    in_rows, in_columns = (row < rows)[:, None], (column < features)[None, :]
    mask = in_rows & in_columns
    kind = out.dtype.element_ty
    place = row[:, None] * 2 * features + column[None, :]
    g = tl.load(grad + row[:, None] * features + column[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + features, mask=mask, other=0.0).to(tl.float32)

    small = tl.load(
        grad_low + row[:, None] * low_stride + inner[None, :], mask=in_rows & (inner < rank)[None, :], other=0.0
    )
    wide = tl.load(
        a + inner[:, None] * features + column[None, :], mask=in_columns & (inner < rank)[:, None], other=0.0
    )
    g = (g + tl.dot(small, wide, input_precision="ieee")).to(kind).to(tl.float32)

    grad_gate, grad_up = _silu_product_gradients(g, gate, up)
    tl.store(out + place, grad_gate.to(kind), mask=mask)
    tl.store(out + place + features, grad_up.to(kind), mask=mask)


@triton.jit
def rotary_kernel(
    qkv, q, k, v, cos, sin, stride, num_heads, num_kv_heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, KV_HEADS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = place < half
    mask = (head < num_heads + num_kv_heads) & inside
    kind = q.dtype.element_ty
    offset = head * 2 * half + place
    first = tl.load(qkv + row * stride + offset, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv + row * stride + offset + half, mask=mask, other=0.0).to(tl.float32)
    table = row * 2 * half + place
    cos_first, cos_second = _halves(cos, table, half, inside)
    sin_first, sin_second = _halves(sin, table, half, inside)
    turned = (first * cos_first).to(kind).to(tl.float32) - (second * sin_first).to(kind).to(tl.float32)
    other = (second * cos_second).to(kind).to(tl.float32) + (first * sin_second).to(kind).to(tl.float32)
    is_q, is_k = mask & (head < num_heads), mask & (head >= num_heads)
    to_q = q + row * num_heads * 2 * half + offset
    to_k = k + row * num_kv_heads * 2 * half + offset - num_heads * 2 * half
    tl.store(to_q, turned.to(kind), mask=is_q)
    tl.store(to_q + half, other.to(kind), mask=is_q)
    tl.store(to_k, turned.to(kind), mask=is_k)
    tl.store(to_k + half, other.to(kind), mask=is_k)
    value = tl.arange(0, KV_HEADS)[:, None] * 2 * half + place
    mask = (tl.arange(0, KV_HEADS)[:, None] < num_kv_heads) & inside
    source = qkv + row * stride + (num_heads + num_kv_heads) * 2 * half + value
    target = v + row * num_kv_heads * 2 * half + value
    tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)
    tl.store(target + half, tl.load(source + half, mask=mask, other=0.0), mask=mask)


@triton.jit
def rotary_backward_kernel(
    grad_q, grad_k, grad_v, out, cos, sin, num_heads, num_kv_heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, KV_HEADS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = place < half
    mask = (head < num_heads + num_kv_heads) & inside
    kind = out.dtype.element_ty
    offset = head * 2 * half + place
    is_q, is_k = mask & (head < num_heads), mask & (head >= num_heads)
    from_q = grad_q + row * num_heads * 2 * half + offset
    from_k = grad_k + row * num_kv_heads * 2 * half + offset - num_heads * 2 * half
    first = tl.load(from_q, mask=is_q, other=0.0) + tl.load(from_k, mask=is_k, other=0.0)  # one of them is 0
    second = tl.load(from_q + half, mask=is_q, other=0.0) + tl.load(from_k + half, mask=is_k, other=0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    table = row * 2 * half + place
    cos_first, cos_second = _halves(cos, table, half, inside)
    sin_first, sin_second = _halves(sin, table, half, inside)
    turned = (first * cos_first).to(kind).to(tl.float32) + (second * sin_second).to(kind).to(tl.float32)
    other = (second * cos_second).to(kind).to(tl.float32) - (first * sin_first).to(kind).to(tl.float32)
    width = (num_heads + 2 * num_kv_heads) * 2 * half
    tl.store(out + row * width + offset, turned.to(kind), mask=mask)
    tl.store(out + row * width + offset + half, other.to(kind), mask=mask)
    value = tl.arange(0, KV_HEADS)[:, None] * 2 * half + place
    mask = (tl.arange(0, KV_HEADS)[:, None] < num_kv_heads) & inside
    source = grad_v + row * num_kv_heads * 2 * half + value
    target = out + row * width + (num_heads + num_kv_heads) * 2 * half + value
    tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)
    tl.store(target + half, tl.load(source + half, mask=mask, other=0.0), mask=mask)


@triton.jit
def score_logits_kernel(
    logits, targets, logps, is_argmax, logsumexp, miss, vocabulary, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    target_logit = tl.load(logits + row * vocabulary + target)
    # Each lane keeps a maximum of its own, and the sum of the others' exponentials relative to it.
    most = tl.full([BLOCK], -1e38, dtype=tl.float32)
    others = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):
        place = start + column
        data = tl.load(logits + row * vocabulary + place, mask=place < vocabulary, other=-float("inf"))
        new = tl.maximum(most, data)
        others = others * tl.exp(most - new) + tl.where(place == target, 0.0, tl.exp(data - new))
        most = new
    maximum = tl.max(most, axis=0)
    sum_others = tl.sum(others * tl.exp(most - maximum), axis=0)
    total = sum_others + tl.exp(target_logit - maximum)
    log_total = tl.log(total)
    tl.store(logps + row, target_logit - maximum - log_total)
    tl.store(is_argmax + row, target_logit >= maximum)
    tl.store(logsumexp + row, maximum + log_total)
    tl.store(miss + row, sum_others / total)


@triton.jit
def residual_kernel(logits, targets, logsumexp, miss, residual, vocabulary, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = place < vocabulary
    data = tl.load(logits + row * vocabulary + place, mask=mask, other=0.0)
    others = -tl.exp(data - tl.load(logsumexp + row))
    value = tl.where(place == tl.load(targets + row), tl.load(miss + row), others)
    tl.store(residual + row * vocabulary + place, value.to(residual.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_kernel(x, weight, out, scale, columns, eps, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    data = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(data * data, axis=0) / columns + eps)
    unit = (data * factor).to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (unit * gain).to(out.dtype.element_ty), mask=mask)
    tl.store(scale + row, factor)


@triton.jit
def rms_norm_backward_kernel(grad, x, weight, scale, out, columns, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    factor = tl.load(scale + row)
    unit = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32) * factor
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    inner = tl.load(grad + row * columns + column, mask=mask, other=0.0).to(tl.float32) * gain
    mean = tl.sum(inner * unit, axis=0) / columns
    tl.store(out + row * columns + column, (factor * (inner - unit * mean)).to(out.dtype.element_ty), mask=mask)
