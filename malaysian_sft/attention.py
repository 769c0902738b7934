"""Attention over packed documents: variable-length kernels on a GPU, an exact loop over documents elsewhere."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F


def attention_backend(device) -> str:
    """What "packed" attention runs on for a device: flash-attn-4, flash-attn-3, flash-attn-2, varlen_attn (PyTorch's
    own) or sdpa.

    On a GPU of compute capability 8.0 (Ampere) or later the first of these that is installed and supports it;
    elsewhere, and for float32 tensors anywhere, an exact loop of scaled_dot_product_attention over the documents.
    """
    return _backend(torch.device(device))[0]


@functools.cache
def _backend(device: torch.device) -> tuple[str, Callable | None]:
    if device.type != "cuda":
        return "sdpa", None
    major, _ = torch.cuda.get_device_capability(device)
    # (name, module, first and last compute capability that it is built for)
    for name, module, first, last in (
        ("flash-attn-4", "flash_attn.cute", 9, 10),
        ("flash-attn-3", "flash_attn_interface", 9, 9),
        ("flash-attn-2", "flash_attn", 8, 12),
        ("varlen_attn", "torch.nn.attention.varlen", 8, 99),
    ):
        if first <= major <= last and (function := _import_varlen(module)) is not None:
            # Not an operator of PyTorch as the others are: torch.compile would trace into the compiler of its kernels.
            return name, torch.compiler.disable(function) if name == "flash-attn-4" else function
    return "sdpa", None


def _import_varlen(module: str) -> Callable | None:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if not absent:  # what is missing or broken is something that it needs
            print(
                f"warning: {module} is installed, but cannot be imported ({error}); attention does without it",
                file=sys.stderr,
            )
        return None
    return getattr(found, "flash_attn_varlen_func", None) or getattr(found, "varlen_attn", None)


@functools.cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _call_varlen(
    function: Callable, query, key, value, boundaries, longest: int, scaling: float | None, window: int | None
):
    """Call a variable-length attention kernel, whichever of the known signatures it has. Tensors are (T, heads, D)."""
    accepts = _parameters(function)
    kwargs = {}
    if "softmax_scale" in accepts:  # flash-attn 2, 3 and 4, which returns (out, log-sum-exp or None)
        kwargs = {"cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries, "softmax_scale": scaling, "causal": True}
        if "max_seqlen_q" in accepts:
            kwargs |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        if window is not None:
            kwargs["window_size"] = (window - 1, 0)
        out = function(query, key, value, **kwargs)
        return out[0] if isinstance(out, tuple) else out
    # torch.nn.attention.varlen of PyTorch 2.11, which takes fewer keys than queries unasked, and later
    kwargs = {"window_size": (-1 if window is None else window - 1, 0), "scale": scaling}
    if "enable_gqa" in accepts:
        kwargs["enable_gqa"] = key.shape[1] != query.shape[1]
    return function(query, key, value, boundaries, boundaries, longest, longest, **kwargs)


def _document_loop(query, key, value, boundaries: list[int], scaling: float | None, window: int | None):
    """Exact attention, document by document. query (1, heads, T, D), key and value (1, kv_heads, T, D); returns (1,
    heads, T, D)."""
    if boundaries[-1] != query.shape[2]:
        raise ValueError(
            f"packed attention: cu_seq_lens_q ends at {boundaries[-1]}, but there are {query.shape[2]} tokens"
        )
    outputs = []
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        mask = None
        if window is not None and end - start > window:
            at = torch.arange(end - start, device=query.device)
            mask = (at[:, None] >= at) & (at[:, None] - at < window)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(outputs, dim=2)


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q=None,
    max_length_q: int | None = None,
    **kwargs,
):
    """Causal attention within each document, by transformers' contract for attention functions.

    query (B, heads, T, D), key and value (B, kv_heads, T, D); returns ((B, T, heads, D), None). `cu_seq_lens_q`, int32
    (N + 1,), and `max_length_q` bound the documents in the flattened B * T tokens; without them every batch row is one
    document. The kernel reads the boundaries on the device, so nothing waits for the GPU. Raises ValueError for what it
    cannot do exactly: masks, dropout, soft caps, attention sinks, non-causal attention, caches.
    """
    batch, heads, tokens, _ = query.shape
    _refuse_unsupported(module, attention_mask, dropout, is_causal, kwargs, tokens, key.shape[2])
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, heads, D)
    if cu_seq_lens_q is None:
        max_length_q = tokens
        cu_seq_lens_q = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    elif max_length_q is None:
        raise ValueError("packed attention: cu_seq_lens_q came without max_length_q; pass collate's batch whole")
    out = attend(query, key, value, cu_seq_lens_q, int(max_length_q), scaling, sliding_window)
    return out.reshape(batch, tokens, heads, -1), None


def attend(query, key, value, boundaries, longest, scaling=None, sliding_window=None):
    """Causal attention within each document: query (T, heads, D), key and value (T, kv_heads, D) -> (T, heads, D).

    boundaries int32 (documents + 1,); longest, an int, the longest document; scaling of the scores, None: D^-1/2.
    """
    dtype = query.dtype
    if query.device.type == "cuda" and dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")  # norms kept in float32 must not push attention out of the kernels
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    function = _backend(query.device)[1] if dtype in (torch.float16, torch.bfloat16) else None
    if function is not None:
        # The output has its query's layout. Partial rotary (GLM-4.5) leaves that head by head; such an output would be
        # copied for o_proj, and both of them kept for the backward. Elsewhere this copies nothing.
        query = query.contiguous()
        return _call_varlen(function, query, key, value, boundaries, longest, scaling, sliding_window).contiguous()
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, T, D)
    out = _document_loop(query, key, value, boundaries.tolist(), scaling, sliding_window)
    return out[0].transpose(0, 1).contiguous()


def _refuse_unsupported(module, attention_mask, dropout, is_causal, kwargs, query_length, key_length) -> None:
    problem = None
    if attention_mask is not None:
        problem = "an attention_mask; documents are bounded by cu_seq_lens_q, leave the mask out"
    elif dropout:
        problem = f"attention dropout {dropout}; set attention_dropout to 0"
    elif is_causal is False or getattr(module, "is_causal", True) is False:
        problem = "non-causal attention"
    elif query_length != key_length:
        problem = f"{query_length} queries for {key_length} keys (a cache?); generate with attn_implementation='sdpa'"
    else:
        for name in ("softcap", "s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                problem = f"{name}, which this model needs"
    if problem is not None:
        raise ValueError(f"packed attention cannot do {problem}")


def _no_mask(*args, attention_mask=None, **kwargs):
    """transformers asks for a mask: hand back what the caller gave (None, or a mask that packed_attention refuses),
    build nothing."""
    return attention_mask


def register_attention(masks: bool = True) -> str:
    """Register packed_attention with transformers under the name it returns, for `attn_implementation=`.

    masks: whether a model may be given an attention_mask, so that it is refused. Without, as in training, transformers
    makes no mask, and drops one it is given; and it does not look for documents in position_ids, which waits for the
    GPU at the start of every forward.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    name = "packed" if masks else "packed_without_masks"
    AttentionInterface.register(name, packed_attention)
    if masks:
        AttentionMaskInterface.register(name, _no_mask)
    return name
