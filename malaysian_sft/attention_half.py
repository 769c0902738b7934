"""The attention half of a decoder layer under LoRA or DoRA as three autograd functions, not some forty operations.

    h, normed = attention_half(layer, hidden, ...)      h = hidden + o_proj(attention(norm(hidden))); normed = norm(h)

Queries, keys and values are one product with the stacked weights, their three A another; norms, rotary and the sum with
the residual are kernels (norm_rope.py). Kept for the backward: the layer's input, q k v before and after rotary, the
LoRA inner products, attention's output, h. The normed input is made again from its rstd, which costs one read, and so
is `normed`, which the MLP half saves.

Letters: T tokens; H hidden; N = width of q, k and v together; r LoRA rank; s = scaling. Forward and backward:

    1  n = norm(x)                                 8  d = dh + norm'(dnormed)
    2  qkv = n W^T + s u B^T, u = n A^T            9  dattention = d Wo^T' + s du Ao, du = d Bo
    3  q, k = rotary(norm(q)), rotary(norm(k))    10  dAo = s du^T attention, dBo = s d^T u
    4  attention                                  11  dq, dk by 3's transpose, dv
    5  o = attention Wo^T + s u Bo^T              12  dn = dqkv W + s du A, du = dqkv B
    6  h = x + o                                  13  dA = s du^T n, dB = s dqkv^T u
    7  normed = norm(h)                           14  dx = d + norm'(dn)
"""

import ast
import contextlib
import inspect
import sys
import textwrap
import types
from functools import lru_cache

import torch
from torch import nn
from transformers.models.glm4_moe import modeling_glm4_moe as glm4_moe
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from malaysian_sft.attention import attend
from malaysian_sft.lora_linear import dora_scale
from malaysian_sft.norm_rope import (
    RMSNorm,
    column_products,
    norm_rope_backward,
    norm_rope_forward,
    rms_norm_backward,
    rms_norm_forward,
    scaled,
)


def groups_of(bases):
    """[(weight, bias or None, its columns of qkv)]: one group if the weights lie side by side, else one each."""
    widths = [base.out_features for base in bases]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    at, adjacent = bases[0].weight.data_ptr(), not bases[0].weight.is_meta
    adjacent = adjacent and not hasattr(bases[0].weight, "ds_id")  # ZeRO-3 brings a weight back to another place
    for base in bases:
        adjacent = adjacent and base.weight.is_contiguous() and base.weight.data_ptr() == at
        at += base.weight.numel() * base.weight.element_size()
    if not adjacent:
        return [(b.weight, b.bias, slice(start, start + w)) for b, start, w in zip(bases, starts, widths, strict=True)]
    first = bases[0].weight.detach()
    whole = first.as_strided((sum(widths), first.shape[1]), first.stride())
    bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
    return [(whole, bias, slice(0, sum(widths)))]


@torch.no_grad()
def lay_side_by_side(causal_lm):
    """Give q, k and v of every fused layer one storage, in order, so that their products are one; values are kept."""
    for layer in causal_lm.base_model.layers:
        if "forward" not in vars(layer):  # as transformers wrote it
            continue
        projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        weights = [module.get_base_layer().weight for module in projections]
        if not any(weight.is_meta or hasattr(weight, "to_local") for weight in weights):
            parts = torch.cat(weights).split([weight.shape[0] for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.data = part


def together(adapters, stacked, dtype):
    """(the first `stacked` A one on another, the other A, the B) of the adapters in `adapters_of`'s order, in dtype."""
    adapters = [adapter.to(dtype) for adapter in adapters]
    return torch.cat(adapters[:stacked]), *adapters[stacked:]


def comes_back(adapters):
    """Whether ZeRO-3 has these parameters: it brings them back for the backward, and a reference to what it gathered
    for the forward would keep that until then."""
    return all(hasattr(adapter, "ds_id") for adapter in adapters)


class NormedQKV(torch.autograd.Function):
    """Steps 1 to 3 and 11 to 14. Also hands x through, so that the residual's gradient is added in step 14's kernel.

    scale (N,) fp32: DoRA's, of q, k and v side by side, or None. Kept then is qkv without its bias, since the scale's
    gradient is <dqkv, qkv> / scale, row by row.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, facts, scale, *adapters):
        groups, norm_weight, eps, head_norms, head_eps, D, widths, scaling = facts
        n, _, rstd = rms_norm_forward(x, norm_weight, eps)
        lora_A, *lora_B = together(adapters, 3, x.dtype)  # (3 r, H)
        u = n @ lora_A.T  # (T, 3 r)
        qkv = x.new_empty(len(x), sum(widths))  # (T, N)
        for weight, bias, columns in groups:
            if bias is None or scale is not None:
                torch.mm(n, weight.T, out=qkv[:, columns])
            else:
                torch.addmm(bias, n, weight.T, out=qkv[:, columns])
        for part, inner, b in zip(qkv.split(widths, 1), u.chunk(3, 1), lora_B, strict=True):
            part.addmm_(inner, b.T, alpha=scaling)
        kept = qkv
        if scale is not None:
            kept = scaled(qkv, scale, out=qkv)
            qkv = with_bias(kept, groups)
        q, k, v = (part.unflatten(1, (-1, D)) for part in qkv.split(widths, 1))  # (T, heads, D)
        q, k = norm_rope_forward(q, k, head_norms, cos, sin, head_eps)
        ctx.facts, ctx.dtypes = facts, [a.dtype for a in adapters]
        ctx.adapters = adapters if comes_back(adapters) else None
        kept_adapters = [] if ctx.adapters else [lora_A, *lora_B]
        ctx.save_for_backward(x, rstd, u, kept, cos, sin, scale, *kept_adapters)
        return q, k, v, x

    @staticmethod
    def backward(ctx, dq, dk, dv, dx):
        x, rstd, u, kept, cos, sin, scale, *kept_adapters = ctx.saved_tensors
        lora_A, *lora_B = kept_adapters or together(ctx.adapters, 3, x.dtype)
        groups, norm_weight, eps, head_norms, head_eps, D, widths, scaling = ctx.facts
        dqkv, dscale = torch.empty_like(kept), None
        qkv = kept if scale is None else with_bias(kept, groups)
        q, k, _ = (part.unflatten(1, (-1, D)) for part in qkv.split(widths, 1))
        dq_part, dk_part, dv_part = dqkv.split(widths, 1)
        out = [part.unflatten(1, (-1, D)) for part in (dq_part, dk_part)]
        norm_rope_backward(dq, dk, q, k, head_norms, cos, sin, head_eps, out)
        dv_part.copy_(dv.flatten(1))
        if scale is not None:
            dscale = column_products(dqkv, kept) / scale
            dqkv = scaled(dqkv, scale, out=dqkv)
        n, _, _ = rms_norm_forward(x, norm_weight, eps, rstd=rstd)
        du = torch.empty_like(u)
        grads_B = []
        for part, inner, dinner, b in zip(dqkv.split(widths, 1), u.chunk(3, 1), du.chunk(3, 1), lora_B, strict=True):
            torch.mm(part, b, out=dinner)
            grads_B.append((part.T @ inner).mul_(scaling))
        grads_A = (du.T @ n).mul_(scaling).chunk(3)  # (r, H) each
        grads = [grad.to(dtype) for grad, dtype in zip([*grads_A, *grads_B], ctx.dtypes, strict=True)]
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, dscale, *grads
        dn = du @ (lora_A * scaling)  # (T, H)
        for weight, _, columns in groups:
            dn.addmm_(dqkv[:, columns], weight)
        return rms_norm_backward(dn, x, norm_weight, rstd, dx), None, None, None, dscale, *grads


def with_bias(qkv, groups):
    """qkv (T, N) plus the biases of its groups, if they have any."""
    if all(bias is None for _, bias, _ in groups):
        return qkv
    parts = [bias if bias is not None else qkv.new_zeros(at.stop - at.start) for _, bias, at in groups]
    return qkv + torch.cat(parts)


class OutputAddNorm(torch.autograd.Function):
    """Steps 5 to 10: (h, norm(h), its rstd) from attention's output (T, heads D) and the residual x (T, H). The norm
    may go without a gradient, if who takes it returns what it owes through h. scale (H,) fp32: DoRA's, or None."""

    @staticmethod
    def forward(ctx, attention, x, facts, scale, lora_A, lora_B):
        weight, bias, norm_weight, eps, scaling = facts
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        u = attention @ a.T  # (T, r)
        plain = bias is None or scale is not None
        o = attention @ weight.T if plain else torch.addmm(bias, attention, weight.T)
        o.addmm_(u, b.T, alpha=scaling)
        kept = None if scale is None else scaled(o, scale, out=o)
        if scale is not None and bias is not None:
            o = o + bias
        normed, h, rstd = rms_norm_forward(o, norm_weight, eps, residual=x)
        ctx.adapters = (lora_A, lora_B) if comes_back((lora_A, lora_B)) else None
        ctx.save_for_backward(attention, u, h, rstd, scale, kept, *([] if ctx.adapters else [a, b]))
        ctx.facts, ctx.dtypes = facts, (lora_A.dtype, lora_B.dtype)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return h, normed, rstd

    @staticmethod
    def backward(ctx, dh, dnormed, _):
        attention, u, h, rstd, scale, kept, *kept_adapters = ctx.saved_tensors
        a, b = kept_adapters or (adapter.to(h.dtype) for adapter in ctx.adapters)
        weight, _, norm_weight, _, scaling = ctx.facts
        dx = dh if dnormed is None else rms_norm_backward(dnormed, h, norm_weight, rstd, dh)  # (T, H)
        d, dscale = dx, None
        if scale is not None:
            dscale, d = column_products(dx, kept) / scale, scaled(dx, scale)
        du = d @ b
        dattention = (d @ weight).addmm_(du, a, alpha=scaling)
        grad_A, grad_B = (du.T @ attention).mul_(scaling), (d.T @ u).mul_(scaling)
        return dattention, dx, None, dscale, grad_A.to(ctx.dtypes[0]), grad_B.to(ctx.dtypes[1])


# ----------------------------------------------------------------------------------------------------------------------
# In place of transformers' code
# ----------------------------------------------------------------------------------------------------------------------


@lru_cache
def body(function):
    """A function's code without names of types, comments and docstring, to compare what two functions do."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    statements = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    return "\n".join(ast.unparse(statement) for statement in statements)


def is_like(module, *kinds):
    """Whether the forward of `module`'s class is, statement by statement, that of one of these transformers classes."""
    return body(type(module).forward) in {body(kind.forward) for kind in kinds}


def usual_rotary(module):
    """Whether the modeling file of `module`'s class turns queries and keys as Llama does, or as GLM-4.5, which turns a
    part: `forward` calls functions of its file, and these differ between families whose forward is the same (ERNIE-4.5
    and Cohere interleave the halves)."""
    names = vars(sys.modules[type(module).__module__])
    functions = [names.get("apply_rotary_pos_emb"), names.get("rotate_half")]
    if not all(isinstance(function, types.FunctionType) for function in functions):
        return False
    usual = [(llama.apply_rotary_pos_emb, llama.rotate_half), (glm4_moe.apply_rotary_pos_emb, glm4_moe.rotate_half)]
    return tuple(map(body, functions)) in {tuple(map(body, pair)) for pair in usual}


def plain_lora(module):
    """Whether a linear layer is PEFT's with one adapter, LoRA or DoRA, and no dropout: what the functions above
    compute."""
    if "default" not in getattr(module, "lora_A", {}):
        return False
    return not isinstance(module.lora_dropout["default"], nn.Dropout) or module.lora_dropout["default"].p == 0


def alike(projections):
    """Whether all have the same rank and scaling, and all or none of them DoRA."""
    return len({(m.r["default"], m.scaling["default"], m.use_dora["default"]) for m in projections}) == 1


def scale_of(projections):
    """DoRA's scales of the projections' rows, side by side, fp32; None for LoRA. Their gradients reach magnitudes."""
    if not projections[0].use_dora["default"]:
        return None
    return torch.cat([dora_scale(module) for module in projections])


def adapters_of(projections):
    """The A of all projections, then their B."""
    return [getattr(m, part)["default"].weight for part in ("lora_A", "lora_B") for m in projections]


def why_not_fusable(layer):
    """What keeps a decoder layer's attention half from `attention_half`, in words; None if nothing does."""
    attention = getattr(layer, "self_attn", None)
    if not is_like(layer, llama.LlamaDecoderLayer):
        return "the layer's forward is not norm, attention, sum, norm, MLP, sum"
    if not is_like(attention, llama.LlamaAttention, Qwen2Attention, Qwen3Attention, glm4_moe.Glm4MoeAttention):
        return f"{type(attention).__name__}.forward is not q, k, v, rotary, attention, output"
    if not usual_rotary(attention):
        return f"{type(attention).__module__.rpartition('.')[2]} has a rotary embedding of its own"
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if getattr(attention, "use_qk_norm", True):
        norms += [
            norm for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm")) if norm is not None
        ]
    if not all(is_like(norm, llama.LlamaRMSNorm) for norm in norms):
        return "a norm is not the usual RMSNorm"
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    if not all(plain_lora(module) for module in projections):
        return "a projection has no LoRA, or dropout"
    if not alike(projections):
        return "projections differ in rank or scaling"
    if getattr(attention.config, "attention_dropout", 0.0):
        return "attention has dropout"
    return None


def facts_of(layer):
    """(NormedQKV's facts, OutputAddNorm's facts) of a layer: frozen tensors and constants, looked up once a step."""
    attention = layer.self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    bases = [module.get_base_layer() for module in projections]
    has_norms = getattr(attention, "use_qk_norm", hasattr(attention, "q_norm"))
    head_norms = (attention.q_norm.weight, attention.k_norm.weight) if has_norms else None
    head_eps = attention.q_norm.variance_epsilon if has_norms else 0.0
    norm, after = layer.input_layernorm, layer.post_attention_layernorm
    widths = [base.out_features for base in bases]
    scaling = projections[0].scaling["default"]
    out = attention.o_proj.get_base_layer()
    heads = head_norms, head_eps, attention.head_dim
    first = groups_of(bases), norm.weight, norm.variance_epsilon, *heads, widths, scaling
    return first, (out.weight, out.bias, after.weight, after.variance_epsilon, scaling)


def attention_half(layer, hidden, position_embeddings, boundaries, longest, rotate_again=False):
    """(h, normed) (T, H) each, and rstd (T,): see the module's docstring. hidden (T, H); position_embeddings (cos,
    sin), each (1, T, R); boundaries and longest bound the documents, as for `attend`. rotate_again: rotated queries and
    keys are not kept for the backward, but made again from those before rotary, which are: a pass over them, for their
    memory."""
    attention = layer.self_attn
    first, second = facts_of(layer)
    cos, sin = (x[0].contiguous() for x in position_embeddings)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    q, k, v, residual = NormedQKV.apply(hidden, cos, sin, first, scale_of(projections), *adapters_of(projections))
    window = getattr(attention, "sliding_window", None)
    with rotated_again(q, k, v, cos, sin, first) if rotate_again else contextlib.nullcontext():
        out = attend(q, k, v, boundaries, longest, attention.scaling, window).flatten(1)  # (T, heads D)
    projections = [attention.o_proj]
    return OutputAddNorm.apply(out, residual, second, scale_of(projections), *adapters_of(projections))


def fused_forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                  position_embeddings=None, cu_seq_lens_q=None, max_length_q=None, **kwargs):  # fmt: skip
    """A decoder layer's forward over one row of packed documents; with a mask or a cache, transformers' own."""
    if attention_mask is not None or past_key_values is not None or cu_seq_lens_q is None:
        kwargs |= dict(cu_seq_lens_q=cu_seq_lens_q, max_length_q=max_length_q, position_ids=position_ids)
        kwargs |= dict(past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings)
        return type(self).forward(self, hidden_states, attention_mask=attention_mask, **kwargs)
    half = self.recomputed_half if self.recompute_attention else attention_half
    h, normed, rstd = half(self, hidden_states[0], position_embeddings, cu_seq_lens_q, max_length_q)
    recomputed = self.recompute_attention or getattr(self, "gradient_checkpointing", False)
    with contextlib.nullcontext() if recomputed else made_again(normed, h, self.post_attention_layernorm, rstd):
        return (h + self.mlp(normed[None])[0])[None]


def made_again(normed, h, norm, rstd):
    """Within: whoever saves `normed` for the backward gets it made again from h, which is kept anyway, and rstd."""
    at, size, dtype = normed.data_ptr(), normed.numel(), normed.dtype

    def pack(tensor):
        same = tensor.data_ptr() == at and tensor.numel() == size and tensor.dtype == dtype
        return (tuple(tensor.shape), tensor.stride()) if same else tensor

    def unpack(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        again, _, _ = rms_norm_forward(h.detach(), norm.weight, norm.variance_epsilon, rstd=rstd)
        return again.as_strided(*saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def rotated_again(q, k, v, cos, sin, facts):
    """Within: whoever saves q or k (T, heads, D) for the backward gets them made again from the row that v is the last
    part of, queries, keys and values side by side before rotary."""
    *_, head_norms, head_eps, D, widths, _ = facts
    at = {x.data_ptr(): (i, x.numel(), x.dtype) for i, x in enumerate((q, k))}
    v, made = v.detach(), {}

    def pack(tensor):
        i, *same = at.get(tensor.data_ptr(), (None, None, None))
        return (i, tuple(tensor.shape), tensor.stride()) if same == [tensor.numel(), tensor.dtype] else tensor

    def unpack(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        i, *form = saved
        if i not in made:
            start = v.storage_offset() - widths[0] - widths[1]
            row = v.as_strided((len(v), sum(widths)), (sum(widths), 1), start)
            before = [part.unflatten(1, (-1, D)) for part in row.split(widths, 1)[:2]]
            made.update(enumerate(norm_rope_forward(*before, head_norms, cos, sin, head_eps)))
        return made.pop(i).as_strided(*form)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def recomputed_half(*inputs):
    """attention_half, computed again in the backward. It draws no random numbers whose state would have to be kept."""
    return torch.utils.checkpoint.checkpoint(attention_half, *inputs, use_reentrant=False, preserve_rng_state=False)


def fuse_attention_half(layer):
    """Give a decoder layer the fused forward; returns None, or in words why it stays as transformers wrote it."""
    if (reason := why_not_fusable(layer)) is not None:
        return reason
    layer.recompute_attention = False
    layer.recomputed_half = recomputed_half
    layer.forward = types.MethodType(fused_forward, layer)
    return None


def fast_norm(module):
    """Give an RMSNorm of the usual form the kernel's forward."""
    if type(module).__name__.endswith("RMSNorm") and is_like(module, llama.LlamaRMSNorm):
        module.forward = types.MethodType(
            lambda self, hidden_states: RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon), module
        )
