"""The model of train_moe.py: transformers' own on the meta device, experts wrapped, LoRA on the rest, its loss,
recomputation, sharding."""

import os
import types

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from fused_moe_lora import FusedMoELoRA, wrap_experts
from malaysian_sft.attention import register_attention
from malaysian_sft.attention_half import lay_side_by_side
from malaysian_sft.documents_apart import takes_document_numbers, with_document_numbers
from malaysian_sft.fast_parts import use_fast_parts
from malaysian_sft.flat_adapters import FlatAdapters
from malaysian_sft.frozen_ring import FrozenRing
from malaysian_sft.lora import active_experts, apply_lora
from malaysian_sft.lora_linear import LoraLinear, use_lora_linear
from malaysian_sft.planning import default_mode
from malaysian_sft.run import say


def make_mesh(device, shard_nodes):
    """One dimension to shard over; with more nodes than `shard_nodes`, a second, outer one that holds copies of the
    model.

    With a copy per node, weights are gathered over the links inside it, and only adapter gradients cross the network.
    """
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    shard = local * shard_nodes
    if world % shard:
        raise ValueError(f"--shard_nodes {shard_nodes}: {world} ranks, {local} a node, are no multiple of {shard}")
    if world == shard:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=("replicate", "shard"))


def nll_and_gradient(logits, targets):
    """(sum of negative log-likelihoods, fp32; its gradient in the logits' dtype) of logits (n, V) and targets (n,)."""
    wide = logits.float()
    log_normaliser = wide.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    nll = (log_normaliser - wide.gather(1, targets[:, None])).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return nll, ((wide - log_normaliser).exp() - hit.float()).to(logits.dtype)


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of the targets' negative log-likelihoods, fp32: hidden (n, H), frozen weight (V, H), targets (n,).

    Logits exist for 1,024 tokens at a time, and the gradient is made of them at once, in the forward. The idea is
    Liger's fused linear cross entropy; this one never waits for the GPU, which Liger's does once in either direction.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_loss):
        total, gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        for h, t, out in zip(hidden.split(1024), targets.split(1024), gradient.split(1024), strict=True):
            nll, logits_gradient = chunk_loss(h @ weight.T, t)
            total += nll
            if ctx.needs_input_grad[0]:
                torch.mm(logits_gradient, weight, out=out)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None


class RouterLoad:
    """Counts, on the device, how many tokens each expert of each layer was sent in the forward passes since the last
    `take`."""

    def __init__(self, experts):
        self.enabled, self.counts = False, None
        self.counted = None  # (T,) bool: the tokens that are counted; None: all
        self.experts = list(experts)
        for layer, module in enumerate(self.experts):
            module.register_forward_pre_hook(lambda _, inputs, layer=layer: self._count(layer, inputs[1]))

    def _count(self, layer, top_k_index):
        if self.counts is None:
            self.counts = torch.zeros(
                len(self.experts), self.experts[0].num_experts, dtype=torch.int64, device=top_k_index.device
            )
        if not self.enabled:  # a recomputation in the backward, validation, a place without a pack
            return
        counted = torch.ones_like(top_k_index)
        if self.counted is not None:
            counted *= self.counted[:, None]
        self.counts[layer].scatter_add_(0, top_k_index.flatten(), counted.flatten())  # bincount would wait for the GPU

    def take(self):
        """(layers, E) counts over all ranks, on the CPU; starts again from zero. Collective."""
        dist.all_reduce(self.counts)
        counts = self.counts.to("cpu", copy=True)
        self.counts.zero_()
        return counts


def load_balancing_loss(router_logits, top_k):
    """E * sum over experts of (share of the tokens sent to it) * (mean router probability), over all layers: Switch,
    eq. 4 to 6.

    router_logits: one (T, E) per layer. As transformers' load_balancing_loss_func, without waiting for the GPU.
    """
    shares, probabilities = [], []
    for logits in router_logits:
        probability = logits.float().softmax(dim=-1)  # (T, E)
        chosen = probability.topk(top_k, dim=-1).indices.flatten()
        shares.append(
            torch.zeros_like(probability[0]).scatter_add_(0, chosen, torch.ones_like(chosen, dtype=probability.dtype))
        )
        probabilities.append(probability.sum(dim=0))
    tokens = sum(logits.shape[0] for logits in router_logits)
    return len(shares[0]) * (torch.stack(shares).sum(0) / tokens * torch.stack(probabilities).sum(0) / tokens).sum()


class ModelWithLoss(nn.Module):
    """A causal LM and its loss as one module."""

    ring = None  # the FrozenRing of a sharded model
    graphs = None  # the PackGraphs of a model that is trained with them

    def __init__(self, causal_lm, router_aux_loss_coef=0.0, compiled=False):
        super().__init__()
        self.causal_lm = causal_lm
        self.router_aux_loss_coef = router_aux_loss_coef
        self.chunk_loss = compiled_for_any_length(nll_and_gradient, [0, 0]) if compiled else nll_and_gradient
        self.router_load = RouterLoad(module for module in causal_lm.modules() if isinstance(module, FusedMoELoRA))
        self.document_numbers = takes_document_numbers(causal_lm)
        self.with_norms = [module for module in causal_lm.modules() if isinstance(module, (FusedMoELoRA, LoraLinear))]

    def train(self, mode=True):
        """As torch's, but blocks of experts and their routers stay as they are when served: noise on what they see or
        choose (Mixtral's router_jitter_noise, Phi-MoE's sparsemixer) would train experts for tokens that are not
        theirs."""
        super().train(mode)
        for block in self.causal_lm.modules():
            children = list(block.children())
            if any(isinstance(child, FusedMoELoRA) for child in children):
                block.training = False
                for child in children:  # a shared expert may have dropout before its LoRA
                    if not any(isinstance(module, (FusedMoELoRA, LoraLinear)) for module in child.modules()):
                        child.eval()
        return self

    def forget_norms(self):
        """To be called after every optimiser step: DoRA's row norms, and what is gathered, are of the adapter as it
        was."""
        if self.ring is not None:
            self.ring.forget()
        if self.graphs is not None and self.graphs.pairs:
            return self.graphs.renew_norms()
        for module in self.with_norms:
            module.forget_norms()

    def forward(self, batch):
        """(summed negative log-likelihood, load-balancing loss or 0) of a batch made by `to_batch`; an EMPTY_PACK's are
        both 0."""
        batch = dict(batch)
        predicting, targets = batch.pop("predicting"), batch.pop("targets")
        batch = with_document_numbers(batch) if self.document_numbers else batch
        empty = len(targets) == 0
        if self.graphs is not None and self.training and torch.is_grad_enabled():
            hidden = self.graphs(batch, counts=not empty)
        else:
            self.router_load.enabled = self.training and not empty
            outputs = self.causal_lm.base_model(
                **batch, use_cache=False, output_router_logits=self.router_aux_loss_coef > 0
            )
            self.router_load.enabled, hidden = False, outputs.last_hidden_state
        hidden = hidden[0].index_select(0, predicting)  # (n, H)
        loss = SummedCrossEntropy.apply(hidden, self.causal_lm.get_output_embeddings().weight, targets, self.chunk_loss)
        if self.router_aux_loss_coef == 0 or empty:
            return loss, torch.zeros_like(loss)
        return loss, load_balancing_loss(outputs.router_logits, active_experts(self.causal_lm.config))


def build_model(config, args, lora_args):
    """The model on the meta device: transformers' own, experts wrapped, LoRA on the rest; returns (PeftModel,
    ModelWithLoss)."""
    if args.router_aux_loss_coef > 0 and not hasattr(config, "router_aux_loss_coef"):
        raise ValueError(
            f"--router_aux_loss_coef: {config.model_type} balances its experts in another way and defines no such loss"
        )
    activations = "full" if args.activations == "auto" else args.activations
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            config.get_text_config(),
            dtype=getattr(torch, args.dtype),
            attn_implementation=register_attention(masks=False),
        )
        wrap_experts(
            causal_lm,
            r=lora_args.expert_rank(config),
            lora_alpha=lora_args.expert_alpha(config),
            use_dora=lora_args.use_dora,
            mode=args.memory_mode or default_mode("moe", activations),
            cache_norms=lora_args.use_dora,
            fp8=args.base_dtype == "fp8",
            arithmetic=args.expert_arithmetic,
        )
        peft_model = apply_lora(causal_lm, lora_args)
    for number, layer in enumerate(causal_lm.base_model.layers):
        for module in layer.modules():
            if isinstance(module, FusedMoELoRA):
                module.mode = "frugal" if number < (args.frugal_layers or 0) else module.mode
                module.keep_transposed = number < (args.transposed_layers or 0)
    use_lora_linear(causal_lm)
    if args.fast_parts:
        say(use_fast_parts(causal_lm))
    set_activations(causal_lm, activations)
    model = ModelWithLoss(causal_lm, args.router_aux_loss_coef, args.fast_parts and torch.cuda.is_available()).train()
    return peft_model, model


def set_activations(causal_lm, policy):
    """Choose what the backward recomputes (TrainingArguments.activations). The experts' own part was chosen with their
    mode."""
    if policy == "full":
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    if policy == "selective":
        for layer in causal_lm.base_model.layers:
            if hasattr(layer, "recompute_attention"):
                layer.recompute_attention = True
                continue
            # the experts stay outside: theirs is the only part that costs more to compute again than to keep
            for part in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm):
                part.forward = types.MethodType(recomputed(type(part).forward), part)


def recomputed(forward):
    """`forward`, whose activations are computed again in the backward."""

    def checkpointed(self, *args, **kwargs):
        return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)

    return checkpointed


def compiled_for_any_length(function, length_dims):
    """torch.compile(function), told that argument i's dimension length_dims[i] is a number of tokens.

    No two packs have the same number, and torch.compile left to itself compiles for the first one, then again for
    others.
    """
    compiled = torch.compile(function)

    def call(*args, **options):
        for tensor, dim in zip(args, length_dims, strict=False):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return compiled(*args, **options)

    return call


def shard(model, mesh, args, use_dora):
    """Spread the layers' adapters over the ranks, in place, and their frozen weights unless --gather_base False.

    Returns the FrozenRing that gathers them; None for a single rank, for which nothing is done.
    """
    if mesh.size() == 1:
        return None
    # DoRA's magnitudes are near the weights' norms, where bf16 steps are larger than what a step of training moves:
    # leave fp32 be.
    dtype = torch.float32 if use_dora or args.dtype == "float32" else torch.bfloat16
    layers = list(model.causal_lm.base_model.layers)
    adapters = FlatAdapters(layers, mesh, dtype)
    inside = {id(p) for flats in adapters.layers for flat in flats for _, _, p in flat.places}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in inside:
            raise ValueError(f"{name} is trained and in no decoder layer: its gradient would not be reduced")
    model.ring = FrozenRing(layers, adapters, args.gather_base is not False and mesh["shard"].size() > 1)
    return model.ring


def allocate(causal_lm, ring, device):
    """Give a (sharded) meta-device model its storage on `device`."""
    if ring is None:
        causal_lm.to_empty(device=device)
    else:
        ring.allocate(causal_lm, device)
    if ring is None or not ring.frozen:  # the ring's buffers have q, k and v side by side
        lay_side_by_side(causal_lm)
