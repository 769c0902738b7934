"""norm_rope.py against fp64 formulas and transformers' own code: in plain PyTorch, by the kernels in Triton's
interpreter, and on a GPU (`-m gpu`) in bf16. A kernel may be no further from the truth than PyTorch in its dtype."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from malaysian_sft import norm_rope
from malaysian_sft.norm_rope import RMSNorm, Rotary, ScaleColumns, norm_rope_backward, norm_rope_forward

# (T, query heads, key heads, D, R, norms): whole and partial rotary, more heads than a block, one key head, odd sizes
SHAPES = [(5, 4, 2, 16, 16, True), (3, 9, 1, 16, 8, True), (4, 2, 2, 32, 16, False), (1, 17, 3, 24, 12, True)]


def normal(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def error(got, truth):
    return ((got.double().cpu() - truth.cpu()).norm() / truth.cpu().norm().clamp_min(1e-30)).item()


def gradients(function, inputs, upstream):
    """Outputs of `function` and the gradients of its floating-point inputs that require one, as a list."""
    inputs = [x.detach().clone().requires_grad_(grad) for x, grad in inputs]
    out = function(*(x for x in inputs))
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [u.to(o.dtype) for u, o in zip(upstream, out, strict=True)])
    return [*(o.detach() for o in out), *(x.grad for x in inputs if x.requires_grad)]


def three_way(ours, theirs, inputs, upstream, slack):
    """`ours` is as near to `theirs` in fp64 as `theirs` is in the inputs' dtype."""
    truth = gradients(theirs, [(x.double(), grad) for x, grad in inputs], [u.double() for u in upstream])
    plain = gradients(theirs, inputs, upstream)
    for i, (got, same, true) in enumerate(zip(gradients(ours, inputs, upstream), plain, truth, strict=True)):
        assert error(got, true) <= 1.1 * error(same, true) + slack, (i, error(got, true), error(same, true))


def their_norm(x, weight):
    x32 = x.double() if x.dtype == torch.float64 else x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def check_norm(device, dtype, slack):
    for shape in ((7, 48), (2, 3, 33), (1, 64)):
        x, weight = normal(*shape, device=device, dtype=dtype), normal(shape[-1], device=device, dtype=dtype)
        three_way(
            lambda x, weight: RMSNorm.apply(x, weight, 1e-6),
            their_norm,
            [(x, True), (weight, False)],
            [normal(*shape, device=device, dtype=dtype)],
            slack,
        )


def check_sum(device, dtype, slack):
    """Norm of a sum: both outputs, and a backward that adds the residual's gradient."""
    x, residual, dy, dsum = (normal(6, 40, device=device, dtype=dtype) for _ in range(4))
    weight = normal(40, device=device, dtype=dtype)
    normed, total, rstd = norm_rope.rms_norm_forward(x, weight, 1e-6, residual=residual)
    assert error(total, x.double() + residual.double()) < slack
    assert torch.equal(normed, norm_rope.rms_norm_forward(total, weight, 1e-6, rstd=rstd)[0])
    dx = norm_rope.rms_norm_backward(dy, total, weight, rstd, dsum)
    leaf = total.double().requires_grad_()
    (truth,) = torch.autograd.grad(their_norm(leaf, weight.double()), leaf, dy.double())
    assert error(dx, truth + dsum.double()) < slack


def check_rope(device, dtype, slack):
    for T, q_heads, k_heads, D, R, norms in SHAPES:
        width = (q_heads + 2 * k_heads) * D
        qkv = normal(T, width, device=device, dtype=dtype)  # q and k are parts of a wider row
        q, k, _ = (x.unflatten(1, (-1, D)) for x in qkv.split([q_heads * D, k_heads * D, k_heads * D], 1))
        weights = tuple(normal(D, device=device, dtype=dtype) for _ in "qk") if norms else None
        angle = torch.rand(T, R // 2) * 6
        cos, sin = (f(torch.cat([angle, angle], -1)).to(device, dtype).contiguous() for f in (torch.cos, torch.sin))

        def theirs(q, k, cos=cos, sin=sin, weights=weights, R=R):
            if weights is not None:
                q, k = (their_norm(x, w.to(x.dtype)) for x, w in zip((q, k), weights, strict=True))
            turned = apply_rotary_pos_emb(
                q[..., :R].transpose(0, 1)[None], k[..., :R].transpose(0, 1)[None], cos[None].to(q), sin[None].to(q)
            )
            rest = q[..., R:], k[..., R:]
            return tuple(torch.cat([t[0].transpose(0, 1), x], -1) for t, x in zip(turned, rest, strict=True))

        upstream = [normal(*x.shape, device=device, dtype=dtype) for x in (q, k)]
        truth = gradients(theirs, [(q.double(), True), (k.double(), True)], [u.double() for u in upstream])
        plain = gradients(theirs, [(q, True), (k, True)], upstream)
        out = norm_rope_forward(q, k, weights, cos, sin, 1e-6)
        grads = torch.zeros_like(qkv)
        parts = [x.unflatten(1, (-1, D)) for x in grads.split([q_heads * D, k_heads * D, k_heads * D], 1)]
        norm_rope_backward(*upstream, q, k, weights, cos, sin, 1e-6, parts[:2])
        for got, same, true in zip([*out, *parts[:2]], plain, truth, strict=True):
            assert got.shape == true.shape and error(got, true) <= 1.1 * error(same, true) + slack
        assert not parts[2].any(), "nothing beyond q and k is written"
        if not norms:
            flat = [x.transpose(0, 1)[None] for x in (q, k)]
            ours = gradients(
                lambda q, k, cos=cos, sin=sin: tuple(
                    x[0].transpose(0, 1) for x in Rotary.apply(q, k, cos[None], sin[None])
                ),
                [(x, True) for x in flat],
                upstream,
            )
            for got, want in zip(ours[:2], out, strict=True):
                assert torch.equal(got, want)


def check_scale(device, dtype, slack):
    y, scale = normal(131, 37, device=device, dtype=dtype), normal(37, device=device).abs()
    three_way(
        ScaleColumns.apply,
        lambda y, scale: (y.to(scale.dtype) * scale).to(y.dtype),
        [(y, True), (scale, True)],
        [normal(131, 37, device=device, dtype=dtype)],
        slack,
    )


CHECKS = (check_norm, check_sum, check_rope, check_scale)


def run_interpreted():
    norm_rope.USE_KERNELS = True
    for check in CHECKS:
        torch.manual_seed(0)
        check("cpu", torch.float32, 1e-6)
        print("ok", check.__name__, flush=True)


@pytest.mark.parametrize("check", CHECKS)
def test_formulas(check):
    torch.manual_seed(0)
    check("cpu", torch.float32, 1e-6)


def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import test_norm_rope as t; t.run_interpreted()"]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok ") == len(CHECKS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype, slack", [(torch.bfloat16, 4e-3), (torch.float32, 1e-6)], ids=["bf16", "fp32"])
def test_kernels(check, dtype, slack):
    torch.manual_seed(0)
    check("cuda", dtype, slack)


def test_transformers_norm_is_what_is_replaced():
    norm = LlamaRMSNorm(24, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 24)
    torch.testing.assert_close(RMSNorm.apply(x, norm.weight, norm.variance_epsilon), norm(x))
