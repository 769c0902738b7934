"""RMSNorm, rotary embedding and DoRA's column scale as small Triton kernels, forward and backward.

They take the place of transformers' chains of element-wise operations, which cost more than the experts when run one by
one, and of torch.compile, whose guards cost the host about 0.1 ms a call. Every weight here is frozen: no gradient of a
norm's weight. All arithmetic is fp32, rounded once at the end. Without a GPU the same formulas run in plain PyTorch;
`USE_KERNELS = True` runs the kernels there too, in Triton's interpreter, which the tests do.

Letters: n rows; H hidden; T tokens; D head dimension; R rotary dimensions, R <= D.
"""

import torch
import triton
import triton.language as tl

USE_KERNELS = False  # also where there is no GPU


def by_kernel(tensor):
    """Whether `tensor` is worked on by the kernels."""
    return tensor.is_cuda or USE_KERNELS


# ----------------------------------------------------------------------------------------------------------------------
# RMSNorm, optionally of a sum
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, rstd_ptr, H, eps, ADD: tl.constexpr,
                    KNOWN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid (n,): out = weight * x / rms(x); ADD: of x + residual, which is written to sum. KNOWN: rstd is read."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    x = tl.load(x_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * H + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if KNOWN:
        rstd = tl.load(rstd_ptr + row)
    else:
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
        tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * H + columns, (x * rstd * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm_forward(x, weight, eps, residual=None, rstd=None):
    """(normed (n, H), x + residual or x itself, rstd (n,) fp32). x and residual (n, H) contiguous, weight (H,).

    rstd given: what an earlier call returned for the same x; only the product is made again.
    """
    n, H = x.shape
    if not by_kernel(x):
        total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
        if rstd is None:
            rstd = torch.rsqrt(total.float().square().mean(-1) + eps)
        return (total.float() * rstd[:, None] * weight.float()).to(x.dtype), total, rstd
    out, known = torch.empty_like(x), rstd is not None
    total = x if residual is None else torch.empty_like(x)
    rstd = rstd if known else torch.empty(n, dtype=torch.float32, device=x.device)
    add = residual is not None
    rms_norm_kernel[(n,)](
        x, residual if add else x, weight, out, total, rstd, H, eps, ADD=add, KNOWN=known,
        BLOCK=triton.next_power_of_2(H), num_warps=8 if H > 1024 else 4,
    )  # fmt: skip
    return out, total, rstd


@triton.jit
def rms_norm_backward_kernel(dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, H, ADD: tl.constexpr,
                             BLOCK: tl.constexpr):  # fmt: skip
    """Grid (n,): dx of rms_norm_kernel; ADD: plus dresidual, the gradient that reaches x on another way."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    x = tl.load(x_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
    g *= tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    unit = x * rstd
    dx = (g - unit * (tl.sum(g * unit, 0) / H)) * rstd
    if ADD:
        dx += tl.load(dresidual_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * H + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def rms_norm_backward(dy, x, weight, rstd, dresidual=None):
    """Gradient (n, H) of x from dy (n, H), plus dresidual (n, H) if given; x, weight and rstd as rms_norm_forward's."""
    n, H = x.shape
    if not by_kernel(x):
        unit, g = x.float() * rstd[:, None], dy.float() * weight.float()
        dx = (g - unit * (g * unit).mean(-1, keepdim=True)) * rstd[:, None]
        return (dx if dresidual is None else dx + dresidual.float()).to(x.dtype)
    dx, add = torch.empty_like(x), dresidual is not None
    rms_norm_backward_kernel[(n,)](
        dy.contiguous(), x, weight, rstd, dresidual.contiguous() if add else x, dx, H, ADD=add,
        BLOCK=triton.next_power_of_2(H), num_warps=8 if H > 1024 else 4,
    )  # fmt: skip
    return dx


class RMSNorm(torch.autograd.Function):
    """transformers' RMSNorm of (..., H), with a frozen weight."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out, _, rstd = rms_norm_forward(rows, weight, eps)
        ctx.save_for_backward(rows, weight, rstd)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        rows, weight, rstd = ctx.saved_tensors
        return rms_norm_backward(dy.reshape(rows.shape), rows, weight, rstd).view(dy.shape), None, None


# ----------------------------------------------------------------------------------------------------------------------
# Rotary embedding of queries and keys, optionally after a norm of each head
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def head_parts(x_ptr, base, heads, dims, head_mask, D, R, HALF: tl.constexpr):
    """(HEADS, HALF) pairs of the rotary dimensions, and the rest, of one token's heads, in fp32."""
    half = R // 2
    first = head_mask[:, None] & (dims < half)[None, :]
    rest = head_mask[:, None] & (dims < D - R)[None, :]
    offsets = base + heads[:, None] * D + dims[None, :]
    x1 = tl.load(x_ptr + offsets, mask=first, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + offsets + half, mask=first, other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr + offsets + R, mask=rest, other=0.0).to(tl.float32)
    return x1, x2, x3, first, rest, offsets


@triton.jit(do_not_specialize=["q_heads", "k_heads"])
def norm_rope_kernel(
    q_ptr, k_ptr, stride_q, stride_k, qw_ptr, kw_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, q_out_ptr, k_out_ptr,
    stride_qo, stride_ko, q_heads, k_heads, D, R, eps,
    NORM: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Grid (T, blocks of HEADS query heads, then of key heads): rotary of [the norm of] every head; q_out and k_out.

    BACKWARD: q_out and k_out become the gradients of q and k, from dq and dk (T, heads, D) contiguous.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks = tl.cdiv(q_heads, HEADS)
    x_ptr, w_ptr, d_ptr, out_ptr = q_ptr, qw_ptr, dq_ptr, q_out_ptr
    stride, stride_out, count = stride_q, stride_qo, q_heads
    if block >= q_blocks:
        block -= q_blocks
        x_ptr, w_ptr, d_ptr, out_ptr = k_ptr, kw_ptr, dk_ptr, k_out_ptr
        stride, stride_out, count = stride_k, stride_ko, k_heads
    heads = block * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, HALF)
    half = R // 2
    cos1 = tl.load(cos_ptr + token * R + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_ptr + token * R + half + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + token * R + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_ptr + token * R + half + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    if NORM:
        w1 = tl.load(w_ptr + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(w_ptr + half + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
        w3 = tl.load(w_ptr + R + dims, mask=dims < D - R, other=0.0).to(tl.float32)[None, :]
        x1, x2, x3, first, rest, _ = head_parts(x_ptr, token * stride, heads, dims, heads < count, D, R, HALF)
        squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1) + tl.sum(x3 * x3, 1)
        rstd = (1.0 / tl.sqrt(squares / D + eps))[:, None]
        x1, x2, x3 = x1 * rstd, x2 * rstd, x3 * rstd
    if BACKWARD:
        d1, d2, d3, first, rest, _ = head_parts(d_ptr, token * count * D, heads, dims, heads < count, D, R, HALF)
        y1 = d1 * cos1 + d2 * sin2
        y2 = d2 * cos2 - d1 * sin1
        y3 = d3
        if NORM:
            y1, y2, y3 = y1 * w1, y2 * w2, y3 * w3
            mean = ((tl.sum(y1 * x1, 1) + tl.sum(y2 * x2, 1) + tl.sum(y3 * x3, 1)) / D)[:, None]
            y1, y2, y3 = (y1 - x1 * mean) * rstd, (y2 - x2 * mean) * rstd, (y3 - x3 * mean) * rstd
    else:
        if NORM:
            x1, x2, x3 = x1 * w1, x2 * w2, x3 * w3
        else:
            x1, x2, x3, first, rest, _ = head_parts(x_ptr, token * stride, heads, dims, heads < count, D, R, HALF)
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
        y3 = x3
    out = out_ptr + token * stride_out + heads[:, None] * D + dims[None, :]
    tl.store(out, y1.to(out_ptr.dtype.element_ty), mask=first)
    tl.store(out + half, y2.to(out_ptr.dtype.element_ty), mask=first)
    tl.store(out + R, y3.to(out_ptr.dtype.element_ty), mask=rest)


def launch_norm_rope(q, k, weights, cos, sin, eps, out, upstream=None):
    """Run norm_rope_kernel: q, k and out's two (T, heads, D), heads side by side, any stride from token to token."""
    (T, q_heads, D), k_heads, R = q.shape, k.shape[1], cos.shape[-1]
    q_weight, k_weight = weights if weights is not None else (q, k)
    dq, dk = upstream if upstream is not None else (q, k)
    heads = 8
    norm_rope_kernel[(T, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))](
        q, k, q.stride(0), k.stride(0), q_weight, k_weight, cos, sin, dq, dk, out[0], out[1],
        out[0].stride(0), out[1].stride(0), q_heads, k_heads, D, R, eps,
        NORM=weights is not None, BACKWARD=upstream is not None, HEADS=heads,
        HALF=triton.next_power_of_2(max(R // 2, D - R)), num_warps=4,
    )  # fmt: skip
    return out


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def norm_rope_reference(x, weight, cos, sin, eps):
    """Queries or keys (T, heads, D) in plain PyTorch: the norm of every head (weight None: none), then rotary."""
    R, dtype = cos.shape[-1], x.dtype
    x = x.float()
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    turned, rest = x[..., :R], x[..., R:]
    turned = turned * cos.float()[:, None] + rotate_half(turned) * sin.float()[:, None]
    return torch.cat([turned, rest], dim=-1).to(dtype)


def norm_rope_forward(q, k, weights, cos, sin, eps):
    """(q, k) (T, heads, D), contiguous, after the norm of every head and rotary on the first R dimensions.

    weights: (q_norm's, k_norm's) (D,) or None for models without these norms; cos, sin (T, R) contiguous.
    """
    if not by_kernel(q):
        return tuple(
            norm_rope_reference(x, weights and weights[i], cos, sin, eps).contiguous() for i, x in enumerate((q, k))
        )
    return launch_norm_rope(q, k, weights, cos, sin, eps, (q.new_empty(q.shape), k.new_empty(k.shape)))


def norm_rope_backward(dq, dk, q, k, weights, cos, sin, eps, out):
    """Write the gradients of q and k into out, two (T, heads, D) tensors that may be parts of a wider row."""
    if not by_kernel(q):
        with torch.enable_grad():
            for i, (x, d) in enumerate(((q, dq), (k, dk))):
                x = x.detach().requires_grad_()
                y = norm_rope_reference(x, weights and weights[i], cos, sin, eps)
                out[i].copy_(torch.autograd.grad(y, x, d)[0])
        return out
    return launch_norm_rope(q, k, weights, cos, sin, eps, out, (dq.contiguous(), dk.contiguous()))


class Rotary(torch.autograd.Function):
    """transformers' apply_rotary_pos_emb: q and k (1, heads, T, D), cos and sin (1, T, R)."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        flat = [x[0].transpose(0, 1).contiguous() for x in (q, k)]  # (T, heads, D)
        cos, sin = cos[0].contiguous(), sin[0].contiguous()
        ctx.save_for_backward(cos, sin)
        return tuple(x.transpose(0, 1)[None] for x in norm_rope_forward(*flat, None, cos, sin, 0.0))

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        flat = [x[0].transpose(0, 1).contiguous() for x in (dq, dk)]
        out = norm_rope_backward(*flat, *flat, None, cos, sin, 0.0, [torch.empty_like(x) for x in flat])
        return *(x.transpose(0, 1)[None] for x in out), None, None


# ----------------------------------------------------------------------------------------------------------------------
# DoRA's scale of a projection's columns
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def scale_columns_kernel(x_ptr, scale_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Grid (n, blocks of N): out = x * scale, scale (N,) fp32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    x = tl.load(x_ptr + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + columns, mask=mask, other=0.0)
    tl.store(out_ptr + row * N + columns, (x * scale).to(out_ptr.dtype.element_ty), mask=mask)


def scaled(x, scale, out=None):
    """x (n, N), contiguous, * scale (N,) fp32, in x's dtype: DoRA's scale, whose changes are finer than bf16. out: may
    be x itself."""
    out = torch.empty_like(x) if out is None else out
    if not by_kernel(x):
        return out.copy_(x.float() * scale)
    block = min(1024, triton.next_power_of_2(x.shape[1]))
    scale_columns_kernel[(x.shape[0], triton.cdiv(x.shape[1], block))](x, scale, out, x.shape[1], BLOCK=block)
    return out


@triton.jit
def column_products_kernel(x_ptr, y_ptr, out_ptr, n, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks of ROWS rows, blocks of N): out (row blocks, N) fp32 = sums over the rows of x * y."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        mask = (columns < N) & (first + i < n)
        x = tl.load(x_ptr + (first + i) * N + columns, mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(y_ptr + (first + i) * N + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * N + columns, total, mask=columns < N)


def column_products(x, y):
    """(N,) fp32: sums over the rows of x * y, both (n, N) contiguous."""
    if not by_kernel(x):
        return (x.float() * y.float()).sum(0)
    (n, N), rows = x.shape, 128
    parts = torch.empty(triton.cdiv(n, rows), N, dtype=torch.float32, device=x.device)
    column_products_kernel[(parts.shape[0], triton.cdiv(N, 256))](x, y, parts, n, N, ROWS=rows, BLOCK=256)
    return parts.sum(0)


class ScaleColumns(torch.autograd.Function):
    """y (n, N) * scale (N,) fp32, in y's dtype, with both gradients."""

    @staticmethod
    def forward(ctx, y, scale):
        y = y.contiguous()
        ctx.save_for_backward(y, scale)
        return scaled(y, scale)

    @staticmethod
    def backward(ctx, d):
        y, scale = ctx.saved_tensors
        d = d.contiguous()
        return scaled(d, scale), column_products(d, y)
