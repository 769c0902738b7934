"""Our kernels in place of transformers' chains of small operations: a part is recognised by its code, not by family."""

import functools
import sys

from malaysian_sft.attention_half import fast_norm, fuse_attention_half, usual_rotary
from malaysian_sft.norm_rope import Rotary


def use_fast_parts(causal_lm, fuse=fuse_attention_half):
    """Put our kernels in place of the chains of small operations that cost more, run one by one, than large products.

    `fuse` gives a decoder layer its fused forward, or says why not: fuse_attention_half, which makes three autograd
    functions of the attention half, or fuse_dense_layer (mlp_half.py). In layers that stay, norms and rotary are
    replaced one by one, and what is not recognised runs as transformers wrote it. Returns a line for the log that says
    what stayed, and why.
    """
    reasons = {}
    for number, layer in enumerate(causal_lm.base_model.layers):
        if (reason := fuse(layer)) is not None:
            reasons.setdefault(reason, []).append(number)
    for module in causal_lm.modules():
        fast_norm(module)
    if reasons and usual_rotary(causal_lm):
        modeling = sys.modules[type(causal_lm).__module__]
        modeling.apply_rotary_pos_emb = fast_rotary(modeling.apply_rotary_pos_emb)
    layers = len(causal_lm.base_model.layers)
    fused = layers - sum(map(len, reasons.values()))
    stayed = "".join(f"; {len(numbers)} not, since {reason}" for reason, numbers in reasons.items())
    what = "attention halves" if fuse is fuse_attention_half else "whole"
    return f"{what} fused in {fused} of {layers} layers{stayed}"


def fast_rotary(rotary):
    """`rotary`, transformers' apply_rotary_pos_emb, by our kernel for one row of the usual layout.

    It stands in for `rotary` in the family's module, so a second model of the family meets it: it keeps the original as
    __wrapped__, which inspect and `usual_rotary` see through, and is not wrapped again.
    """
    if hasattr(rotary, "__wrapped__"):
        return rotary

    @functools.wraps(rotary)
    def call(q, k, cos, sin, unsqueeze_dim=1):
        if q.shape[0] != 1 or unsqueeze_dim != 1 or cos.dim() != 3:
            return rotary(q, k, cos, sin, unsqueeze_dim)
        return Rotary.apply(q, k, cos, sin)

    return call
