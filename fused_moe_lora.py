"""LoRA and DoRA on the routed experts of a mixture-of-experts layer, frozen base, forward and backward.

A drop-in for the experts modules of transformers 5 (`gate_up_proj (E, 2I, H)`, `down_proj (E, H, I)`):

    model = AutoModelForCausalLM.from_pretrained(...)
    wrap_experts(model, r=32, lora_alpha=64)        # every mlp.experts becomes a FusedMoELoRA; returns how many

On a GPU (Ampere or newer) the Triton kernels run, on a CPU the reference: plain PyTorch, any dtype.
Tests: `pytest tests/test_fused_moe_lora.py`; benchmark: `python benchmarks/bench_fused_moe_lora.py`.

Letters: T tokens; E experts; top_k experts a token; S = T * top_k routed rows, sorted by expert; H hidden; I expert
intermediate; r LoRA rank; s = scaling. Per routed row, with x its token's hidden state, w its router weight and dout
its token's upstream gradient:

    forward                                       backward, da and dv per unit of router weight
    1  u = s x A1^T        gate and up each       6  dB2 = (w dout)^T v
    2  gate_up = x W1^T + u B1^T                  7  dv = s dout B2
       a = silu(gate) up                          8  da = dout W2 + dv A2;  dw = <a, da>, so that y need not be kept
    3  v = s a A2^T                                  d(gate_up) from w da;  9 dB1 = d(gate_up)^T u;  10 dA2 = (w dv)^T a
    4  y = a W2^T + v B2^T                        11 du = s d(gate_up) B1
    5  out = sum over the token's rows of w y     12 dA1 = du^T x
                                                  13 dx = sum over the token's rows of d(gate_up) W1 + du A1

There is no dW: the base is frozen. DoRA multiplies the outputs of 2 and 4 by magnitude / ||W + s B A||, row by row of
W; then y is kept, and dout is multiplied by the scale before 8 (B2 is, before 7). The reference, the kernels and the
launches below keep these numbers' order. With `arithmetic="fp8"` the base's products of 2, 4, 8 and 13 are of FP8
operands (fp8.Fp8Linear).
"""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from malaysian_sft.disk_names import attach
from malaysian_sft.fp8 import FP8, SCALE, Fp8Linear, Quantised, check_arithmetic, quantise, scale_shape
from malaysian_sft.lora import lora_scaling, start_lora
from malaysian_sft.moe_autograd import Projection, moe_lora
from malaysian_sft.moe_fp8 import transpose_weights
from malaysian_sft.moe_widen import ReferenceAgain, WideRoom


def moe_lora_reference(
    hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate, up, down, scaling, arithmetic="bf16"
):
    """The experts block in plain PyTorch; autograd gives every gradient. One pair of matrix products per expert that
    has rows.

    hidden_states (T, H); top_k_index (T, top_k) integers in [0, E); top_k_weights (T, top_k); gate_up_proj (E, 2I, H),
    gate rows first; down_proj (E, H, I); gate, up and down each a Projection: lora_A (E, r, in), lora_B (E, out, r)
    and for DoRA scale (E, out), magnitude / ||W + scaling B A||; scaling a float. Computes in hidden_states' dtype,
    whatever the dtype of the rest; returns (T, H) in that dtype. arithmetic: "fp8" for products of the base, widened
    FP8 in fp32 or fp64, by Fp8Linear; the router weights then multiply a, not y, so that their gradient is the <a, da>
    that the kernels have.
    """
    tokens, top_k = top_k_index.shape
    dtype, in_fp8 = hidden_states.dtype, arithmetic == "fp8"
    order = top_k_index.reshape(-1).argsort(stable=True)  # (S,) routed rows sorted by expert
    rows_per_expert = torch.bincount(top_k_index.reshape(-1), minlength=gate_up_proj.shape[0]).tolist()
    x_sorted = hidden_states[order // top_k]  # (S, H)
    weights = top_k_weights.to(dtype).reshape(-1, 1)  # (S, 1)
    weights_sorted = weights[order].split(rows_per_expert)

    def project(x, weight, adapter, e):
        inner = F.linear(x, adapter.lora_A[e].to(dtype))
        base = Fp8Linear.apply(x, weight) if in_fp8 else F.linear(x, weight.to(dtype))
        y = base + scaling * F.linear(inner, adapter.lora_B[e].to(dtype))
        return y if adapter.scale is None else y * adapter.scale[e].to(dtype)

    outputs = []
    for e, x in enumerate(x_sorted.split(rows_per_expert)):
        if x.shape[0] == 0:
            continue
        gate_weight, up_weight = gate_up_proj[e].chunk(2)
        activation = F.silu(project(x, gate_weight, gate, e)) * project(x, up_weight, up, e)  # (rows, I)
        activation = activation * weights_sorted[e] if in_fp8 else activation
        outputs.append(project(activation, down_proj[e], down, e))  # (rows, H)
    y_sorted = torch.cat(outputs) if outputs else hidden_states.new_zeros(0, hidden_states.shape[1])
    y = torch.empty_like(y_sorted).index_copy(0, order, y_sorted)  # back in token order
    y = y if in_fp8 else y * weights
    return y.view(tokens, top_k, -1).sum(dim=1)  # (T, H)


@torch.no_grad()
def squared_row_norms(weight):
    """||W||^2 of every output row: weight (E, out, in) -> (E, out) fp32, a DTensor's gathered first.

    One expert at a time, so that no fp32 copy of W exists.
    """
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return torch.stack([w.float().square().sum(dim=-1) for w in weight])


@torch.no_grad()
def dora_norm(weight, weight_norms_squared, lora_A, lora_B, scaling):
    """||W + s B A|| of every output row, without forming W + s B A.

    weight (E, out, in), weight_norms_squared (E, out) fp32, lora_A (E, r, in), lora_B (E, out, r) -> (E, out) fp32,
    detached as in the DoRA paper (arXiv 2402.09353, section 4.3): ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>.
    """
    lora_A32, lora_B32 = lora_A.float(), lora_B.float()
    weight_A = torch.bmm(weight, lora_A.to(weight.dtype).transpose(1, 2)).float()  # (E, out, r)
    gram_A = torch.bmm(lora_A32, lora_A32.transpose(1, 2))  # (E, r, r)
    cross = (weight_A * lora_B32).sum(dim=-1)
    square = (torch.bmm(lora_B32, gram_A) * lora_B32).sum(dim=-1)
    return (weight_norms_squared + 2 * scaling * cross + scaling**2 * square).clamp_min_(0).sqrt_()


def in_place(held, fresh):
    """The tensors `fresh`, in the places of those in `held` where there are any."""
    if held is None or any(tensor is None for tensor in held):
        return fresh
    return [tensor.copy_(value) for tensor, value in zip(held, fresh, strict=True)]


class FusedMoELoRA(nn.Module):
    """Routed experts with a frozen base and trainable LoRA (or DoRA) on gate, up and down of every expert.

    Parameters, experts in dimension 0 so that a rank's rows are whole experts: `gate_up_proj (E, 2I, H)` and
    `down_proj (E, H, I)` frozen; `{gate,up,down}_proj_lora_A (E, r, in)`, `{gate,up,down}_proj_lora_B (E, out, r)` and
    for DoRA `{gate,up,down}_proj_lora_magnitude (E, out)` fp32 and trainable. `forward(hidden_states, top_k_index,
    top_k_weights)` is the signature of transformers' experts modules.

    mode: "fast" keeps gate, silu(gate) up and the LoRA inner products for the backward, "frugal" recomputes them.
    cache_norms: DoRA's row norms are computed once and kept until `forget_norms()`, which the training loop then has to
    call after every optimiser step; by default every forward computes them.
    wide_room: a WideRoom that all layers share. With it the frozen weights are stored in FP8 (fp8.py), beside them
    their scales `gate_up_proj_scale_inv` and `down_proj_scale_inv`, and widened to `dtype` there when they are used.
    arithmetic: "fp8" multiplies such weights as they are stored, with activations in FP8; LoRA's products stay.
    """

    def __init__(
        self,
        num_experts,
        hidden_size,
        intermediate_size,
        r,
        lora_alpha,
        use_dora=False,
        mode="fast",
        cache_norms=False,
        dtype=None,
        device=None,
        wide_room=None,
        arithmetic="bf16",
    ):
        super().__init__()
        check_arithmetic(arithmetic, wide_room and "fp8", hidden_size, intermediate_size)
        if mode not in ("fast", "frugal"):
            raise ValueError(f'mode is {mode!r}; expected "fast" or "frugal"')
        if r < 1:
            raise ValueError(f"r is {r}; the rank of an expert must be at least 1")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_scaling(lora_alpha, r)
        self.use_dora, self.mode, self.cache_norms = use_dora, mode, cache_norms
        self.dtype, self.wide_room, self.arithmetic = dtype or torch.get_default_dtype(), wide_room, arithmetic

        def frozen(*shape, dtype=dtype if wide_room is None else FP8):
            return nn.Parameter(torch.empty(num_experts, *shape, dtype=dtype, device=device), requires_grad=False)

        def trainable(*shape):
            return nn.Parameter(torch.empty(num_experts, *shape, dtype=torch.float32, device=device))

        self.gate_up_proj = frozen(2 * intermediate_size, hidden_size)
        self.down_proj = frozen(hidden_size, intermediate_size)
        if wide_room is not None:
            rows, columns = scale_shape(intermediate_size, hidden_size)
            self.gate_up_proj_scale_inv = frozen(2 * rows, columns, dtype=torch.float32)
            self.down_proj_scale_inv = frozen(columns, rows, dtype=torch.float32)
        for name, out_features, in_features in self.projections():
            self.register_parameter(f"{name}_lora_A", trainable(r, in_features))
            self.register_parameter(f"{name}_lora_B", trainable(out_features, r))
            if use_dora:
                self.register_parameter(f"{name}_lora_magnitude", trainable(out_features))
        self.forget_norms()
        self.keep_transposed, self._weight_norms, self._transposed = False, None, None
        self.register_load_state_dict_post_hook(FusedMoELoRA._after_load)

    def projections(self):
        """(name, output features, input features) of the three projections of an expert."""
        H, I = self.hidden_size, self.intermediate_size  # noqa: E741
        return ("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)

    def extra_repr(self):
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size},"
            f" intermediate_size={self.intermediate_size}, r={self.r}, lora_alpha={self.lora_alpha},"
            f" use_dora={self.use_dora}, mode={self.mode!r}"
            + (", stored in FP8" if self.wide_room else "")
            + (", computed in FP8" if self.arithmetic == "fp8" else "")
        )

    def _stacks(self):
        """What is stored in FP8, as WideRoom takes it."""
        return [(self.gate_up_proj, self.gate_up_proj_scale_inv, 2), (self.down_proj, self.down_proj_scale_inv, 1)]

    def base_weights(self):
        """(gate_up_proj, down_proj) to multiply with. From FP8 they are widened, and good until another layer asks for
        its own."""
        if self.wide_room is None:
            return self.gate_up_proj, self.down_proj
        return self.wide_room.widened(self, self._stacks(), self.dtype)

    def exact_weights(self):
        """(gate_up_proj, down_proj) stored in FP8, widened without rounding."""
        return self.wide_room.widened(self, self._stacks(), torch.promote_types(self.dtype, torch.float32))

    def stored_weights(self):
        """(gate_up_proj, down_proj) as they are stored in FP8."""
        return tuple(Quantised(values.detach(), scales.detach()) for values, scales, _ in self._stacks())

    def stored_and_transposed(self):
        """`stored_weights`, and their transposes, good until another layer asks for its own, or if `keep_transposed`
        made once and kept."""
        if not self.keep_transposed:
            return *self.stored_weights(), *self.wide_room.transposed(self, self._stacks())
        if self._transposed is None:
            self._transposed = tuple(map(transpose_weights, self.stored_weights()))
        return *self.stored_weights(), *self._transposed

    @torch.no_grad()
    def reset_lora_parameters(self):
        """Start values (`start_lora`) of every expert. Call it once the base weights are loaded."""
        norms = [None] * 3
        if self.use_dora:
            gate_up, down = (squared_row_norms(weight).sqrt() for weight in self.base_weights())
            norms = *gate_up.chunk(2, dim=1), down
        for (name, *_), row_norms in zip(self.projections(), norms, strict=True):
            parts = [getattr(self, f"{name}_lora_{part}", None) for part in ("A", "B", "magnitude")]
            start_lora(f"experts' {name}", *parts, row_norms)
        self._after_load()

    def _after_load(self, *_):
        if self.wide_room is not None:
            self.wide_room.forget(self)
        self.forget_norms()
        self._weight_norms = self._transposed = None

    def forget_norms(self):
        """Drop the cached ||W + s B A||: to be called after an optimiser step when the module was made with
        cache_norms=True."""
        self._norms = None

    def renew_norms(self):
        """||W + s B A|| of the adapter as it is now, where it is cached, if it is."""
        self._norms = in_place(self._norms, self._row_norms())

    @property
    def has_norms(self):
        return self.use_dora

    def _row_norms(self):
        """||W + s B A|| of gate, up and down."""
        if self._weight_norms is None:
            self._weight_norms = [squared_row_norms(weight) for weight in self.base_weights()]
        gate_up, down = self.base_weights()
        gate, up = gate_up.chunk(2, dim=1)
        (gate_squares, up_squares), down_squares = self._weight_norms[0].chunk(2, dim=1), self._weight_norms[1]
        frozen = (gate, gate_squares), (up, up_squares), (down, down_squares)
        return [
            dora_norm(*pair, getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B"), self.scaling)
            for pair, (name, *_) in zip(frozen, self.projections(), strict=True)
        ]

    def _dora_scales(self):
        if not self.use_dora:
            return None, None, None
        if self._norms is None or not self.cache_norms:
            self._norms = self._row_norms()
        magnitudes = [getattr(self, f"{name}_lora_magnitude") for name, *_ in self.projections()]
        return tuple(magnitude.float() / norm for magnitude, norm in zip(magnitudes, self._norms, strict=True))

    def adapters(self):
        """Projections of gate, up and down, with DoRA's scales as they are now."""
        return [
            Projection(getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B"), scale)
            for (name, *_), scale in zip(self.projections(), self._dora_scales(), strict=True)
        ]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """hidden_states (T, H), top_k_index (T, top_k), top_k_weights (T, top_k) -> (T, H) in hidden_states' dtype."""
        adapters, routed = self.adapters(), (hidden_states, top_k_index, top_k_weights)
        in_fp8, again = self.arithmetic == "fp8", None if self.wide_room is None else self.base_weights
        if hidden_states.is_cuda:
            base, again = (self.stored_weights, self.stored_and_transposed) if in_fp8 else (self.base_weights, again)
            return moe_lora(*routed, *base(), *adapters, self.scaling, mode=self.mode, base=again)
        if again is not None:
            tensors = [tensor for adapter in adapters for tensor in adapter]
            reference = partial(moe_lora_reference, arithmetic=self.arithmetic)
            again = self.exact_weights if in_fp8 else again
            return ReferenceAgain.apply(reference, again, self.scaling, *routed, *tensors)
        return moe_lora_reference(*routed, *self.base_weights(), *adapters, self.scaling)


def why_not_conforming(experts):
    """What keeps `experts` from being replaced by FusedMoELoRA, in words; None if it conforms."""
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not isinstance(gate_up, torch.Tensor) or not isinstance(down, torch.Tensor):
        names = ", ".join(name for name, _ in experts.named_parameters()) or "no parameters"
        return f"it holds {names}; expected stacked gate_up_proj (E, 2I, H) and down_proj (E, H, I)"
    differences = []
    if getattr(experts, "is_transposed", False):
        differences.append("its weights are transposed (E, in, out)")
    if not getattr(experts, "is_concatenated", True):
        differences.append("gate and up rows are interleaved")
    biases = [name for name, _ in experts.named_parameters() if name.endswith("bias")]
    if getattr(experts, "has_bias", False) or biases:
        differences.append(f"it has biases ({', '.join(biases)})")
    if not getattr(experts, "has_gate", True):
        differences.append("it has no gate")
    shapes_fit = (
        gate_up.dim() == 3
        and down.dim() == 3
        and tuple(gate_up.shape) == (down.shape[0], 2 * down.shape[2], down.shape[1])
    )
    if not differences and not shapes_fit:
        differences.append(f"shapes {tuple(gate_up.shape)} and {tuple(down.shape)} are not (E, 2I, H) and (E, H, I)")
    activation = getattr(experts, "act_fn", None)
    gate_function = getattr(type(experts), "_apply_gate", None)
    if gate_function is not None and gate_function.__name__ != "_default_apply_gate":
        differences.append(f"it has its own gating function ({type(experts).__name__}._apply_gate)")
    elif activation is not None and not (
        isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    ):
        differences.append(f"its activation is {type(activation).__name__}, not SiLU")
    arguments = list(inspect.signature(type(experts).forward).parameters)[1:]
    if not differences and arguments != ["hidden_states", "top_k_index", "top_k_weights"]:
        differences.append(
            f"its forward takes ({', '.join(arguments)}), not (hidden_states, top_k_index, top_k_weights)"
        )
    return "; ".join(differences) or None


def quantised_stack(weight, parts):
    """weight (E, parts * out, in) -> (values, scales) as FusedMoELoRA holds them: blocks end where a part does."""
    pairs = [[quantise(part) for part in expert.chunk(parts)] for expert in weight]
    return tuple(torch.stack([torch.cat([pair[i] for pair in expert]) for expert in pairs]) for i in (0, 1))


def wrap_experts(model, r, lora_alpha, use_dora=False, mode="fast", cache_norms=False, fp8=False, arithmetic="bf16"):
    """Replace every `...mlp.experts` of `model` by a FusedMoELoRA that holds the same base weights, with fp8 quantised
    to FP8; returns how many. arithmetic: FusedMoELoRA's.

    Works on the meta device too: then call `reset_lora_parameters()` of each once the weights are loaded. Raises
    ValueError, and changes nothing, if an experts module does not conform (saying what differs) or if there is none.
    Nothing but the experts is touched: freeze the rest of the model yourself, or leave that to apply_lora.
    """
    attach(model)
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"}
    found = {name: module for name, module in found.items() if not isinstance(module, FusedMoELoRA)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no module named experts that is not yet wrapped")
    for name, module in found.items():
        reason = why_not_conforming(module)
        if reason:
            raise ValueError(f"{name} ({type(module).__name__}) cannot be wrapped: {reason}")
        check_arithmetic(arithmetic, fp8 and "fp8", *module.down_proj.shape[1:])
    wide_room = WideRoom() if fp8 else None
    for name, module in found.items():
        num_experts, hidden_size, intermediate_size = module.down_proj.shape
        base = dict(dtype=module.gate_up_proj.dtype, device="meta", wide_room=wide_room)
        base["arithmetic"] = arithmetic
        fused = FusedMoELoRA(
            num_experts, hidden_size, intermediate_size, r, lora_alpha, use_dora, mode, cache_norms, **base
        ).train(module.training)
        if not module.gate_up_proj.is_meta:
            # to_empty would also allocate the base: make the adapters alone, and take the base over without a copy
            device = module.gate_up_proj.device
            lora = {n: torch.empty_like(p, device=device) for n, p in fused.named_parameters() if "lora" in n}
            base_weights = {"gate_up_proj": module.gate_up_proj, "down_proj": module.down_proj}
            if fp8:
                for stack, parts in (("gate_up_proj", 2), ("down_proj", 1)):
                    base_weights[stack], base_weights[stack + SCALE] = quantised_stack(base_weights[stack], parts)
            fused.load_state_dict({**base_weights, **lora}, assign=True)
            for stack in base_weights:
                getattr(fused, stack).requires_grad_(False)
            fused.reset_lora_parameters()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, fused)
    return len(found)
