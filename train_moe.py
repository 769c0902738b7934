"""Low-rank fine-tuning of a mixture of experts: a written-out FSDP2 loop, LoRA or DoRA on every linear layer and every expert.

Run it through a launcher, `bash fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh`, on several GPUs, or alone on one device or CPU:

    python3 train_moe.py --model_name_or_path MODEL --dataset data/conversations --run_name try --max_seq_length 1024

Output, under outputs/<run_name>/:
    args.json           every argument, the git commit, the data's fingerprint
    log.jsonl           one record a step: loss, grad_norm, learning_rate, tokens_per_second, mfu, peak_gib, data_wait, router load
    checkpoint-<step>/  once an epoch: a verified PEFT adapter; the newest also holds resume/, what `--resume` continues from

How a step works. The model is transformers' own; the experts of every layer are one FusedMoELoRA (fused_moe_lora.py), the other
linear layers PEFT's, with a faster forward (LoraLinear). FSDP2 shards dimension 0 of every weight, so a rank holds whole experts and
reads only those from the checkpoint. Each rank takes every world_size-th pack of the step; the loss is the sum over all supervised
tokens of the step, divided by their number, whatever the number of ranks and micro-batches. Random numbers are seeded anew for every
step, and the order of the data follows from (seed, epoch), so a position in the run is all that a resumed run must know of either.
"""

import dataclasses
import importlib
import inspect
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import adapter
import multipack
import plan
from fused_moe_lora import FusedMoELoRA, dora_norm, local_part, local_tensor, squared_row_norms, wrap_experts
from record import claim, git_commit, newest_checkpoint, wandb_mode


@dataclass
class TrainingArguments:
    """The run. The defaults are the experiment's; a launcher names its model and itself."""

    model_name_or_path: str = field(metadata={"help": "hub id or directory of the base model"})
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub model"})
    run_name: str = field(default="train_moe", metadata={"help": "the experiment's only name; a launcher passes its file name"})
    output_dir: str | None = field(default=None, metadata={"help": "default: outputs/<run_name>"})
    num_train_epochs: int = field(default=3, metadata={"help": "passes over the data; a checkpoint after each"})
    max_steps: int | None = field(
        default=None, metadata={"help": "steps of the run and of its schedule, in place of num_train_epochs, fewer or more"}
    )
    global_batch_size: int = field(default=32, metadata={"help": "packs in one optimiser step, over all ranks and micro-batches"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak of the schedule"})
    warmup_steps: int = field(
        default=50, metadata={"help": "linear warm-up, its first step at 1/warmup_steps of the peak, then linear decay to the last step"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's, on lora_A and lora_B"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the gradient's global norm to this"})
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "weight of the load-balancing loss; 0: off"})
    seed: int = field(default=0, metadata={"help": "of the adapter's start, the packs, their order, dropout"})
    dtype: Literal["bfloat16", "float32"] = field(default="bfloat16", metadata={"help": "of the base weights and the arithmetic"})
    activations: Literal["auto", "none", "selective", "full"] = field(
        default="auto",
        metadata={
            "help": "what the backward recomputes: nothing; attention and norms (and see memory_mode); or whole layers. "
            "The less, the faster, and the more memory. auto: by plan.py, the least that fits the GPU; without a GPU, full"
        },
    )
    memory_mode: Literal["fast", "frugal"] | None = field(
        default=None,
        metadata={"help": "experts keep gate and up for the backward, or recompute them. Default: what fits, as activations auto"},
    )
    compile: bool | None = field(default=None, metadata={"help": "fuse norms, rotary and the loss with torch.compile. Default: on GPUs"})
    shard_nodes: int = field(
        default=1, metadata={"help": "nodes that share one copy of the model; every further set of nodes holds another"}
    )
    reduce_every_micro_batch: bool | None = field(
        default=None,
        metadata={
            "help": "inside a node, reduce gradients after each micro-batch: slower, and saves a whole fp32 adapter. "
            "Default: only where it must, as activations auto"
        },
    )
    cpu_offload: bool = field(default=False, metadata={"help": "keep weights and optimiser in host memory, for small GPUs"})
    save_steps: int | None = field(default=None, metadata={"help": "checkpoint every so many steps as well as every epoch"})
    resume: bool = field(default=False, metadata={"help": "continue from the newest complete checkpoint of this run"})
    prepare_only: bool = field(default=False, metadata={"help": "tokenise and pack, print the report, and stop"})
    dry_run: bool = field(default=False, metadata={"help": "print what the run needs on this machine, and stop before anything is loaded"})
    ignore_plan: bool = field(default=False, metadata={"help": "start even if plan.py expects the run not to fit"})
    report_to: Literal["wandb", "trackio", "none"] = field(default="wandb", metadata={"help": "experiment tracker"})
    project: str = field(default="malaysian-sft", metadata={"help": "the tracker's project"})

    def __post_init__(self):
        self.output_dir = self.output_dir or os.path.join("outputs", self.run_name)
        for name in ("num_train_epochs", "max_steps", "global_batch_size", "learning_rate", "max_grad_norm", "shard_nodes", "save_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value}: expected a positive number")


# ------------------------------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------------------------------


def setup_distributed():
    """Join torchrun's process group, or make one of this process alone; returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    return device


def make_mesh(device, shard_nodes):
    """One dimension to shard over; with more nodes than `shard_nodes`, a second, outer one that holds copies of the model.

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


def is_main():
    return dist.get_rank() == 0


def say(*words):
    """Print on rank 0, above a progress bar if there is one."""
    if is_main():
        tqdm.write(" ".join(map(str, words)))


# ------------------------------------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------------------------------------


class LoraLinearFunction(torch.autograd.Function):
    """y = x W^T + b + u B^T with u = s x A^T, for a frozen W: forward and backward, two products with W and six of rank r.

    Computes in x's dtype. A and B are cast as they are used, so that no second copy of them lives from forward to backward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling):
        rows = x.reshape(-1, x.shape[-1])  # (T, in)
        u = (rows @ lora_A.to(x.dtype).T).mul_(scaling)  # (T, r)
        y = F.linear(rows, weight, bias).addmm_(u, lora_B.to(x.dtype).T)  # (T, out)
        ctx.save_for_backward(rows, u, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        rows, u, weight, lora_A, lora_B = ctx.saved_tensors
        shape, dy = dy.shape[:-1], dy.reshape(-1, dy.shape[-1])  # (T, out)
        du = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scaling)  # (T, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(du, lora_A.to(dy.dtype)).view(*shape, -1)
        return dx, None, None, (du.T @ rows).to(lora_A.dtype), (dy.T @ u).to(lora_B.dtype), None


def scale_columns(y, scale):
    """y (..., out) * scale (out,) fp32, in y's dtype: DoRA's scale, whose changes are finer than bf16."""
    return (y.float() * scale).to(y.dtype)


class LoraLinear(PeftLinear):
    """PEFT's LoRA / DoRA linear layer, its parameters and names unchanged, with a forward that stays in the activations' dtype.

    PEFT's own casts the activations to the adapter's fp32, which is several times slower. One adapter, named "default". DoRA's
    ||W + s B A|| is computed once and kept until `forget_norms()`, which has to follow every optimiser step.
    """

    norm = None  # (out,) fp32
    scale_columns = staticmethod(scale_columns)  # fuse_small_operations puts a compiled one here

    def forward(self, x, *args, **kwargs):
        weight, bias = self.base_layer.weight, self.base_layer.bias
        lora_A, lora_B = self.lora_A["default"].weight, self.lora_B["default"].weight
        scaling, dropout = self.scaling["default"], self.lora_dropout["default"]
        dora = self.use_dora["default"]
        inner_bias = None if dora else bias  # DoRA scales the product, not the bias
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and self.training:
            u = F.linear(dropout(x), lora_A.to(x.dtype))
            y = F.linear(x, weight, inner_bias) + scaling * F.linear(u, lora_B.to(x.dtype))
        else:
            y = LoraLinearFunction.apply(x, weight, inner_bias, lora_A, lora_B, scaling)
        if not dora:
            return y
        if self.norm is None:
            squares = squared_row_norms(weight.unsqueeze(0))
            self.norm = dora_norm(weight.unsqueeze(0), squares, lora_A.unsqueeze(0), lora_B.unsqueeze(0), scaling)[0]  # detached
        scale = self.lora_magnitude_vector["default"].weight.float() / self.norm
        y = self.scale_columns(y.view(-1, y.shape[-1]), scale).view(y.shape)
        return y if bias is None else y + bias

    def forget_norms(self):
        """Drop the cached ||W + s B A||."""
        self.norm = None


def nll_and_gradient(logits, targets):
    """(sum of negative log-likelihoods, fp32; its gradient in the logits' dtype) of logits (n, V) and targets (n,)."""
    wide = logits.float()
    log_normaliser = wide.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    nll = (log_normaliser - wide.gather(1, targets[:, None])).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return nll, ((wide - log_normaliser).exp() - hit.float()).to(logits.dtype)


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of the targets' negative log-likelihoods, fp32: hidden (n, H), frozen weight (V, H), targets (n,).

    Logits exist for 1,024 tokens at a time, and the gradient is made of them at once, in the forward. The idea is Liger's fused
    linear cross entropy; this one never waits for the GPU, which Liger's does once in either direction.
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
    """Counts, on the device, how many tokens each expert of each layer was sent in the forward passes since the last `take`."""

    def __init__(self, experts):
        self.enabled, self.counts = False, None
        self.experts = list(experts)
        for layer, module in enumerate(self.experts):
            module.register_forward_pre_hook(lambda _, inputs, layer=layer: self._count(layer, inputs[1]))

    def _count(self, layer, top_k_index):
        if self.counts is None:
            self.counts = torch.zeros(len(self.experts), self.experts[0].num_experts, dtype=torch.int64, device=top_k_index.device)
        if not self.enabled:  # a recomputation in the backward, validation, a place without a pack
            return
        index = top_k_index.reshape(-1)
        self.counts[layer].scatter_add_(0, index, torch.ones_like(index))  # bincount would wait for the GPU

    def take(self):
        """(layers, E) counts over all ranks, on the CPU; starts again from zero. Collective."""
        dist.all_reduce(self.counts)
        counts = self.counts.to("cpu", copy=True)
        self.counts.zero_()
        return counts


def load_balancing_loss(router_logits, top_k):
    """E * sum over experts of (share of the tokens sent to it) * (mean router probability), over all layers: Switch, eq. 4 to 6.

    router_logits: one (T, E) per layer. As transformers' load_balancing_loss_func, without waiting for the GPU.
    """
    shares, probabilities = [], []
    for logits in router_logits:
        probability = logits.float().softmax(dim=-1)  # (T, E)
        chosen = probability.topk(top_k, dim=-1).indices.flatten()
        shares.append(torch.zeros_like(probability[0]).scatter_add_(0, chosen, torch.ones_like(chosen, dtype=probability.dtype)))
        probabilities.append(probability.sum(dim=0))
    tokens = sum(logits.shape[0] for logits in router_logits)
    return len(shares[0]) * (torch.stack(shares).sum(0) / tokens * torch.stack(probabilities).sum(0) / tokens).sum()


class ModelWithLoss(nn.Module):
    """A causal LM and its loss as one module: FSDP's root then gathers embeddings, last norm and head for both."""

    def __init__(self, causal_lm, router_aux_loss_coef=0.0, compiled=False):
        super().__init__()
        self.causal_lm = causal_lm
        self.router_aux_loss_coef = router_aux_loss_coef
        self.chunk_loss = compiled_for_any_length(nll_and_gradient, [0, 0]) if compiled else nll_and_gradient
        self.router_load = RouterLoad(module for module in causal_lm.modules() if isinstance(module, FusedMoELoRA))
        self.with_norms = [module for module in causal_lm.modules() if isinstance(module, (FusedMoELoRA, LoraLinear))]

    def forget_norms(self):
        """To be called after every optimiser step: DoRA's row norms are those of the adapter as it was."""
        for module in self.with_norms:
            module.forget_norms()

    def forward(self, batch):
        """(summed negative log-likelihood, load-balancing loss or 0) of a batch made by `to_batch`; an EMPTY_PACK's are both 0."""
        batch = dict(batch)
        predicting, targets = batch.pop("predicting"), batch.pop("targets")
        empty = len(targets) == 0
        self.router_load.enabled = self.training and not empty
        outputs = self.causal_lm.base_model(**batch, use_cache=False, output_router_logits=self.router_aux_loss_coef > 0)
        self.router_load.enabled = False
        hidden = outputs.last_hidden_state[0].index_select(0, predicting)  # (n, H)
        loss = SummedCrossEntropy.apply(hidden, self.causal_lm.get_output_embeddings().weight, targets, self.chunk_loss)
        if self.router_aux_loss_coef == 0 or empty:
            return loss, torch.zeros_like(loss)
        return loss, load_balancing_loss(outputs.router_logits, self.causal_lm.config.num_experts_per_tok)


def build_model(config, args, lora_args):
    """The model on the meta device: transformers' own, experts wrapped, LoRA on the rest; returns (PeftModel, ModelWithLoss)."""
    if args.router_aux_loss_coef > 0 and not hasattr(config, "router_aux_loss_coef"):
        raise ValueError(f"--router_aux_loss_coef: {config.model_type} balances its experts in another way and defines no such loss")
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, args.dtype), attn_implementation=multipack.register_attention()
        )
        wrap_experts(
            causal_lm,
            r=lora_args.expert_rank(config),
            lora_alpha=lora_args.expert_alpha(config),
            use_dora=lora_args.use_dora,
            mode=args.memory_mode or ("frugal" if args.activations == "selective" else "fast"),
            cache_norms=lora_args.use_dora,
        )
        peft_model = adapter.apply_lora(causal_lm, lora_args)
    for module in causal_lm.modules():
        if type(module) is PeftLinear:
            module.__class__ = LoraLinear
    set_activation_policy(causal_lm, "full" if args.activations == "auto" else args.activations)
    compiled = torch.cuda.is_available() if args.compile is None else args.compile
    if compiled:
        fuse_small_operations(causal_lm)
    return peft_model, ModelWithLoss(causal_lm, args.router_aux_loss_coef, compiled).train()


def set_activation_policy(causal_lm, policy):
    """Choose what the backward recomputes (TrainingArguments.activations). The experts' own part was chosen with their mode."""
    if policy == "full":
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    if policy == "selective":
        for layer in causal_lm.base_model.layers:
            # the experts stay outside: theirs is the only part that costs more to compute again than to keep
            for part in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm):
                part.forward = types.MethodType(recomputed(type(part).forward), part)


def recomputed(forward):
    """`forward`, whose activations are computed again in the backward."""

    def checkpointed(self, *args, **kwargs):
        return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)

    return checkpointed


def rms_norm(rows, weight, eps):
    """transformers' RMSNorm of rows (n, width), as a function for torch.compile."""
    wide = rows.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(rows.dtype)


def compiled_for_any_length(function, length_dims):
    """torch.compile(function), told that argument i's dimension length_dims[i] is a number of tokens.

    No two packs have the same number, and torch.compile left to itself compiles for the first one, then again for others.
    """
    compiled = torch.compile(function)

    def call(*args, **options):
        for tensor, dim in zip(args, length_dims, strict=False):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return compiled(*args, **options)

    return call


def fuse_small_operations(causal_lm):
    """Compile the chains of small operations that cost more, run one by one, than the experts: RMSNorm, rotary, DoRA's scale.

    Only these: attention and experts are kernels already, and small compiled functions have no graph to break. A norm is replaced
    if its source is that of transformers' LlamaRMSNorm, which most families copy, rotary if it is a function of (q, k, cos, sin);
    others stay as they are.
    """
    torch._dynamo.config.recompile_limit = 64  # one function serves norms of several widths, with and without gradients
    compiled_norm = compiled_for_any_length(rms_norm, [0])

    def forward(self, hidden_states):
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return compiled_norm(rows, self.weight, self.variance_epsilon).view(hidden_states.shape)

    ordinary = inspect.getsource(LlamaRMSNorm.forward)
    for module in causal_lm.modules():
        if type(module).__name__.endswith("RMSNorm") and inspect.getsource(type(module).forward) == ordinary:
            recompute = "forward" in vars(module)  # the selective policy was there first
            module.forward = types.MethodType(recomputed(forward) if recompute else forward, module)
    compiled_scale = compiled_for_any_length(scale_columns, [0])
    for module in causal_lm.modules():
        if isinstance(module, LoraLinear):
            module.scale_columns = compiled_scale
    modeling = sys.modules[type(causal_lm).__module__]
    rotary = getattr(modeling, "apply_rotary_pos_emb", None)
    if isinstance(rotary, types.FunctionType) and list(inspect.signature(rotary).parameters)[:4] == ["q", "k", "cos", "sin"]:
        modeling.apply_rotary_pos_emb = compiled_for_any_length(rotary, [2, 2, 1, 1])


def plan_arguments(args, data_args, lora_args):
    """plan.py's arguments that these flags stand for; None is left for it to choose."""
    return dict(
        kind="moe",
        max_seq_length=data_args.max_seq_length,
        global_batch_size=args.global_batch_size,
        r=lora_args.r,
        expert_r=lora_args.expert_r,
        use_dora=lora_args.use_dora,
        activation_policy=None if args.activations == "auto" else args.activations,
        memory_mode=args.memory_mode,
        reduce_every_micro_batch=args.reduce_every_micro_batch,
        cpu_offload=args.cpu_offload,
        shard_nodes=args.shard_nodes,
    )


def settle_memory(config, args, data_args, lora_args):
    """Choose what of activations, memory_mode and reduce_every_micro_batch the flags leave open, in place; returns the plan.

    The plan is the same on every rank: that of the GPU with the least memory. Raises ValueError, before anything is loaded, for a run
    that can't fit. Without a GPU, or in fp32, which plan.py does not know, nothing is refused, whole layers are recomputed, and the
    plan is None. A run may be resumed with other choices: they decide what is computed twice, not what is computed.
    """
    machine = plan.this_machine()
    planned = None
    if machine["gpu_memory_gib"] is not None and args.dtype == "bfloat16":
        memory = torch.tensor(machine["gpu_memory_gib"], dtype=torch.float64)
        dist.all_reduce(memory, dist.ReduceOp.MIN)
        machine["gpu_memory_gib"] = memory.item()
        planned = plan.settle(config, ignore=args.ignore_plan, **machine, **plan_arguments(args, data_args, lora_args))
        say(f"{plan.trainer_flags(planned)}: {plan.need(planned)}")
    chosen = planned or {"activation_policy": "full", "memory_mode": None, "reduce_every_micro_batch": False}
    if args.activations == "auto":
        args.activations = chosen["activation_policy"]
    args.memory_mode = args.memory_mode or chosen["memory_mode"] or ("frugal" if args.activations == "selective" else "fast")
    if args.reduce_every_micro_batch is None:
        args.reduce_every_micro_batch = chosen["reduce_every_micro_batch"]
    return planned


def shard(model, mesh, args, use_dora):
    """fully_shard every decoder layer and the root, in place."""
    # DoRA's magnitudes are near the weights' norms, where bf16 steps are larger than what a step of training moves: leave fp32 be.
    cast = None if use_dora or args.dtype == "float32" else torch.bfloat16
    settings = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy() if args.cpu_offload and torch.cuda.is_available() else OffloadPolicy(),
    )
    layers = list(model.causal_lm.base_model.layers)
    for layer in layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    for layer, following in zip(layers, layers[1:], strict=False):  # gather a layer while the one before it computes
        layer.set_modules_to_forward_prefetch([following])
    for layer, previous in zip(layers[1:], layers, strict=False):
        layer.set_modules_to_backward_prefetch([previous])


# ------------------------------------------------------------------------------------------------------------------------------
# Loading: every rank reads its own rows
# ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A tensor of a safetensors checkpoint: where its bytes are."""

    path: Path
    start: int  # offset of its first byte in the file
    shape: tuple
    dtype: torch.dtype


@dataclass
class Piece:
    """Rows [first, first + len(target)) of a checkpoint tensor, to be read into `target`."""

    name: str
    first: int
    target: torch.Tensor


def find_checkpoint(name, revision=None):
    """The directory of a model given as a directory or a hub id, downloaded if it is not in the cache yet.

    Launchers call this in one process (--prepare_only) before the ranks do, which then only find it. Raises ValueError if there is none.
    """
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        fault = str(error).splitlines()[0]
        raise ValueError(f"--model_name_or_path {name}: no such directory, and the hub does not give it ({fault})") from None


def read_sources(directory):
    """{tensor name: Source} of the model in `directory`. Raises ValueError for missing or damaged files."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory}: no *.safetensors file")
    sources = {}
    for name in files:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, but {index.name} lists it")
        header, start = adapter.read_header(path)
        for key, info in header.items():
            if info["dtype"] not in adapter.DTYPES:
                raise ValueError(f"{path}: {key} is {info['dtype']}; expected one of {', '.join(adapter.DTYPES)}")
            sources[key] = Source(path, start + info["data_offsets"][0], tuple(info["shape"]), adapter.DTYPES[info["dtype"]])
    return sources


def frozen_tensors(causal_lm):
    """{name in the base checkpoint: tensor} of what the checkpoint must provide: base parameters and persistent buffers."""
    found = {name: p for name, p in causal_lm.named_parameters() if not p.requires_grad}
    for path, module in causal_lm.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}".lstrip(".")] = buffer
    return {name.replace(".base_layer.", "."): tensor for name, tensor in found.items()}


def plan_reading(tensors, sources):
    """What this rank reads: ([Piece], {every checkpoint tensor that the model needs: its shape}).

    A parameter sharded on dimension 0 needs a range of rows. A stack of experts is found either as such or as one two-dimensional
    tensor per expert and projection; then a range of rows is a set of whole experts.
    """
    pieces, expected = [], {}
    for name, tensor in tensors.items():
        shape, local, first = tuple(tensor.shape), tensor, 0
        if isinstance(tensor, DTensor):
            _, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
            local, first = tensor.to_local(), offset[0] if offset else 0
        local = local.detach()
        stack, _, kind = name.rpartition(".")
        if not stack.endswith(".experts") or name in sources:
            expected[name] = shape
            if local.numel():
                pieces.append(Piece(name, first, local))
            continue
        projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        rows = shape[1] // len(projections)
        for e in range(shape[0]):
            for i, projection in enumerate(projections):
                expert = f"{stack}.{e}.{projection}.weight"
                expected[expert] = (rows, shape[2])
                if first <= e < first + len(local):
                    pieces.append(Piece(expert, 0, local[e - first, i * rows : (i + 1) * rows]))
    return pieces, expected


def check_complete(expected, sources, config, directory):
    """Raise ValueError naming tensors that are missing, unexpected or of another shape; returns those that are ignored on purpose.

    Ignored: layers after the last that predict several tokens ahead (GLM-4.5 publishes one), the head of a model that ties it to the
    embedding, rotary frequencies that old checkpoints carry.
    """
    ahead = getattr(config, "num_mtp_layers", getattr(config, "num_nextn_predict_layers", 0)) or 0
    extra_layers = range(config.num_hidden_layers, config.num_hidden_layers + ahead)
    prefixes = tuple(f"model.layers.{layer}." for layer in extra_layers)
    ignored, extra = [], []
    for name in sources.keys() - expected.keys():
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        (ignored if name.startswith(prefixes) or tied or name.endswith("rotary_emb.inv_freq") else extra).append(name)
    missing = expected.keys() - sources.keys()
    wrong = [f"{n} is {sources[n].shape}, not {s}" for n, s in expected.items() if n in sources and sources[n].shape != s]
    faults = []
    for what, names in (("lacks", missing), ("has, and the model does not", extra), ("has in another shape", wrong)):
        if names:
            faults.append(f"{what}: {', '.join(sorted(names)[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else ""))
    if faults:
        raise ValueError(f"{directory} is no checkpoint of this model. It " + "; it ".join(faults))
    return sorted(ignored)


CHUNK_BYTES = 32 << 20  # of one read: large enough for a disk, small enough that eight threads need little memory


def read_piece(piece, source, progress):
    """Read a piece into its target with plain positioned reads: no page is mapped, so host memory stays at one chunk a thread."""
    row = math.prod(source.shape[1:])
    begin = source.start + piece.first * row * source.dtype.itemsize
    target = piece.target.flatten()  # a view: rows of a contiguous tensor
    assert target.data_ptr() == piece.target.data_ptr(), f"{piece.name}: the target's rows are not contiguous"
    direct = target.device.type == "cpu" and target.dtype == source.dtype
    step = CHUNK_BYTES // source.dtype.itemsize
    staging = None if direct else torch.empty(min(step, target.numel()), dtype=source.dtype, pin_memory=target.is_cuda)
    fd = os.open(source.path, os.O_RDONLY)
    try:
        for at in range(0, target.numel(), step):
            part = target[at : at + step]
            buffer = part if direct else staging[: part.numel()]
            view = memoryview(buffer.view(torch.uint8).numpy())
            read = 0
            while read < len(view):
                count = os.preadv(fd, [view[read:]], begin + at * source.dtype.itemsize + read)
                if count == 0:
                    raise ValueError(f"{source.path}: ends inside {piece.name}")
                read += count
            if not direct:
                part.copy_(buffer)
            progress(read)
    finally:
        os.close(fd)


@torch.no_grad()
def load_weights(causal_lm, directory, device):
    """Give a (sharded) meta-device model its storage on `device` and its base weights from `directory`; returns (bytes, seconds).

    Each rank reads the rows of its own shards, straight to its device, so no rank and no host ever holds the model, and the ranks
    of a shard group together read the checkpoint once. Adapter parameters are left for `reset_adapter`. Raises ValueError, before
    anything is read, naming tensors that are missing, unexpected or of another shape.
    """
    sources = read_sources(directory)
    _, expected = plan_reading(frozen_tensors(causal_lm), sources)
    ignored = check_complete(expected, sources, causal_lm.config, directory)
    if ignored:
        say(f"loading: ignored {len(ignored)} tensors that this model does not use, such as {ignored[0]}")
    causal_lm.to_empty(device=device)
    causal_lm.tie_weights()
    compute_buffers(causal_lm)
    pieces, _ = plan_reading(frozen_tensors(causal_lm), sources)
    total = sum(piece.target.numel() * sources[piece.name].dtype.itemsize for piece in pieces)
    started = time.perf_counter()
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not is_main(), mininterval=1.0) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for reading in [pool.submit(read_piece, piece, sources[piece.name], bar.update) for piece in pieces]:
            reading.result()
    seconds = time.perf_counter() - started
    totals = torch.tensor([float(total)])
    dist.all_reduce(totals)
    say(f"loading: {totals.item() / 1e9:.2f} GB in {seconds:.1f} s, {totals.item() / 1e9 / seconds:.2f} GB/s over all ranks")
    return total, seconds


def compute_buffers(causal_lm):
    """Give buffers that no checkpoint holds (rotary frequencies) their values, by transformers' own initialisation."""
    for path, module in causal_lm.named_modules():
        names = [name for name in module._non_persistent_buffers_set if getattr(module, name) is not None]
        for name in names:
            getattr(module, name).fill_(float("nan"))
        if names:
            causal_lm._init_weights(module)
        for name in names:
            if getattr(module, name).isnan().any():
                raise ValueError(f"{path}.{name} is a buffer that neither the checkpoint nor {type(causal_lm).__name__} gives a value")


@torch.no_grad()
def reset_adapter(causal_lm, seed):
    """Start values of the adapter: A Kaiming-uniform, B zero, magnitudes the row norms of W; the same for any number of ranks."""
    torch.manual_seed(seed)
    for path, module in causal_lm.named_modules():
        if isinstance(module, FusedMoELoRA):
            module.reset_lora_parameters()
        elif isinstance(module, LoraLinear):
            lora_A = module.lora_A["default"].weight
            bound = 1 / math.sqrt(lora_A.shape[1])  # Kaiming-uniform with a = sqrt(5)
            whole = torch.empty(lora_A.shape, dtype=lora_A.dtype, device=lora_A.device).uniform_(-bound, bound)
            local_tensor(lora_A).copy_(local_part(whole, lora_A))
            local_tensor(module.lora_B["default"].weight).zero_()
            if module.use_dora["default"]:
                norms = squared_row_norms(local_tensor(module.base_layer.weight).unsqueeze(0))[0].sqrt()
                if (norms == 0).any():
                    raise ValueError(f"--use_dora: {path} has rows of zeros, and DoRA divides by their norm; train it with LoRA")
                local_tensor(module.lora_magnitude_vector["default"].weight).copy_(norms)


# ------------------------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------------------------


def packs_of_step(dataset, step, steps_an_epoch, global_batch_size):
    """Indices of the packs of optimiser step `step` (0-based, over the whole run), in order; sets the dataset's epoch."""
    epoch, step = divmod(step, steps_an_epoch)
    if dataset.epoch != epoch:
        dataset.set_epoch(epoch)
    return range(step * global_batch_size, min((step + 1) * global_batch_size, len(dataset)))


def micro_batches(dataset, indices, micro_batches_a_rank):
    """This rank's share of the step's packs, as batches on the CPU: every world_size-th pack.

    The last step of an epoch may have fewer packs than there are places. A place without a pack gets one without targets, because
    every rank has to take part in every forward and backward.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = []
    for i in range(micro_batches_a_rank):
        place = i * world + rank
        batches.append(to_batch(dataset[indices[place]] if place < len(indices) else EMPTY_PACK))
    return batches


EMPTY_PACK = [{"input_ids": torch.zeros(2, dtype=torch.int64), "labels": torch.full((2,), multipack.IGNORE)}]


def to_batch(pack):
    """multipack.collate's batch of one pack, its labels replaced by `predicting` (n,), the positions whose next token is
    supervised, and `targets` (n,), those tokens. Found here, on the CPU, so that only these reach the head and nothing waits."""
    batch = multipack.collate([pack])
    labels = batch.pop("labels")[0]  # (T,); a document's first label is always ignored, so none is predicted across a border
    predicting = (labels[1:] != multipack.IGNORE).nonzero()[:, 0]
    batch["predicting"], batch["targets"] = predicting, labels[predicting + 1]
    return batch


def to_device(batch, device):
    """The batch's tensors on the device, copied without waiting."""
    pinned = {k: v.pin_memory() if device.type == "cuda" and isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in pinned.items()}


# ------------------------------------------------------------------------------------------------------------------------------
# A step
# ------------------------------------------------------------------------------------------------------------------------------


def make_optimizer(model, args):
    """Fused AdamW on the adapter, its state allocated at once, so that a checkpoint can be read into it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # magnitudes are not decayed: towards zero they would shrink the base weight itself
    decayed = [p for name, p in named if "magnitude" not in name]
    others = [p for name, p in named if "magnitude" in name]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}] if others else [{"params": decayed}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    for _, p in named:
        step = torch.zeros((), device=local_tensor(p).device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learning_rate(step, total_steps, args):
    """Linear warm-up that starts above zero, then linear decay that would reach zero one step after the last; `step` is 0-based."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    return args.learning_rate * (total_steps - step) / max(1, total_steps - args.warmup_steps)


def forward_backward(model, batches, supervised, args, device, packs=None):
    """Gradients of the step's loss from this rank's batches; returns this rank's [summed loss, summed auxiliary loss].

    supervised: how many tokens of the whole step, over all ranks, have a loss; packs: how many packs it has, if fewer than places.
    The loss is a mean over the ones, the auxiliary loss over the others. FSDP averages gradients over the ranks, and these are sums
    over them, hence the factor of world_size.
    """
    world = dist.get_world_size()
    packs = packs or world * len(batches)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        model.set_requires_gradient_sync(last or args.reduce_every_micro_batch)
        model.set_requires_all_reduce(last)  # across copies of the model, once a step
        model.set_is_last_backward(last)
        loss, auxiliary = model(to_device(batch, device))
        (loss * (world / supervised) + auxiliary * (args.router_aux_loss_coef * world / packs)).backward()
        totals += torch.stack([loss.detach(), auxiliary.detach()])
    return totals


@torch.no_grad()
def clip_gradients(parameters, max_norm, mesh):
    """Scale gradients to a global norm of at most `max_norm`; returns the norm before, on the device."""
    gradients = [local_tensor(p.grad) for p in parameters]
    squares = torch.nn.utils.get_total_norm(gradients, 2.0).square()
    dist.all_reduce(squares, group=mesh["shard"].get_group())
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)
    return norm


@torch.no_grad()
def validate(model, dataset, device):
    """Mean loss per supervised token of the held-out packs. Collective."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for i in range(0, len(dataset), dist.get_world_size()):
        batch = micro_batches(dataset, range(i, min(i + dist.get_world_size(), len(dataset))), 1)[0]
        totals[0] += model(to_device(batch, device))[0]
        totals[1] += len(batch["targets"])
    model.train()
    dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


# ------------------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------------------------


class Checkpointer:
    """Writes outputs/<run>/checkpoint-<step>/ in the background: the adapter and, in resume/, what the run can go on from.

    All of it is put together under .saving/ and renamed into its place as one, so that a checkpoint is complete or not there at all, and
    only then is the previous checkpoint's resume/ removed: once the first is written, one complete checkpoint exists at any moment.
    """

    def __init__(self, peft_model, model, optimizer, args, lora_args, tokenizer, facts):
        self.peft_model, self.args, self.lora_args, self.tokenizer = peft_model, args, lora_args, tokenizer
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.facts = facts  # what must be the same when a run is resumed
        self.group = dist.new_group(backend="gloo")  # the background thread's own
        self.pool, self.writing = ThreadPoolExecutor(1), None

    def state(self):
        """The sharded tensors to resume from, by name."""
        states = {name: self.optimizer.state[p] for name, p in self.named.items()}
        return {
            "adapter": {name: p.detach() for name, p in self.named.items()},
            "exp_avg": {name: state["exp_avg"] for name, state in states.items()},
            "exp_avg_sq": {name: state["exp_avg_sq"] for name, state in states.items()},
        }

    def save(self, step):
        """Copy everything to the host, then return and write it in the background. Collective."""
        self.wait()
        tensors = adapter.adapter_state_dict(self.peft_model)  # on rank 0
        saving = Path(self.args.output_dir, ".saving")
        if is_main():
            shutil.rmtree(saving, ignore_errors=True)  # of a run that was killed
        dist.barrier()
        resume = dcp.async_save(self.state(), checkpoint_id=saving / "resume", process_group=self.group)
        self.writing = self.pool.submit(self._finish, step, tensors, resume, saving)

    def _finish(self, step, tensors, resume, saving):
        final = Path(self.args.output_dir, f"checkpoint-{step}")
        new = saving / final.name
        if tensors:
            base = self.args.model_name_or_path
            adapter.save_adapter(self.peft_model, new, base, self.tokenizer, self.lora_args, tensors=tensors)
        resume.result()  # on rank 0: every rank has written
        if is_main():
            (saving / "resume" / "position.json").write_text(json.dumps({"step": step, **self.facts}, indent=2) + "\n")
            os.replace(saving / "resume", new / "resume")
            previous = [path for path in Path(self.args.output_dir).glob("checkpoint-*/resume") if path.parent != final]
            if final.exists():  # incomplete, or newest_checkpoint would have gone on from it
                os.replace(final, saving / "replaced")
            os.replace(new, final)
            for path in (saving, *previous):
                shutil.rmtree(path)

    def wait(self):
        """Wait until what was being saved is on disk; raises what went wrong there."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    def load(self, directory):
        """Read adapter and optimiser state from checkpoint `directory`, written by any number of ranks; returns its step. Collective."""
        position = json.loads((directory / "resume" / "position.json").read_text())
        for key, value in self.facts.items():
            if position.get(key, value) != value:  # a checkpoint may be older than a key
                was = f"{directory} was trained with {position[key]}"
                raise ValueError(f"--resume: {key} is {value}, but {was}; that is another run, for another --run_name")
        if faults := adapter.base_faults(adapter.Adapter(directory).manifest, self.args.model_name_or_path, self.args.model_revision):
            raise ValueError(f"--resume: {faults[0]}")
        dcp.load(self.state(), checkpoint_id=directory / "resume", process_group=self.group)
        for p in self.named.values():
            self.optimizer.state[p]["step"].fill_(position["step"])
        return position["step"]


def resume_fault(directory):
    """What keeps a run from going on from checkpoint `directory`, in words; None if nothing does."""
    resume = directory / "resume"
    try:
        json.loads((resume / "position.json").read_text())
        for part in dcp.FileSystemReader(resume).read_metadata().storage_data.values():
            file = resume / part.relative_path
            if file.stat().st_size < part.offset + part.length:
                return f"resume/{file.name} is cut short"
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, directory)} is not there"
    except (ValueError, EOFError, pickle.UnpicklingError) as error:
        return f"resume/ cannot be read: {error}"
    return None


# ------------------------------------------------------------------------------------------------------------------------------
# The record of a run
# ------------------------------------------------------------------------------------------------------------------------------


def write_arguments(args, data_args, lora_args, fingerprint, planned):
    """outputs/<run>/args.json: what another person needs to repeat the run; returns the record."""
    arguments = {key: value for group in (args, data_args, lora_args) for key, value in dataclasses.asdict(group).items()}
    record = {
        "launcher": args.run_name,
        "model": args.model_name_or_path,
        "commit": git_commit(),
        "data": fingerprint,
        "world_size": dist.get_world_size(),
        "planned_gib": planned and round(planned["peak_bytes"] / 2**30, 2),
        "arguments": arguments,
    }
    os.makedirs(args.output_dir, exist_ok=True)
    Path(args.output_dir, "args.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


class Log:
    """The same record to the terminal, log.jsonl and the tracker. On rank 0; elsewhere it does nothing."""

    def __init__(self, args, config, first_step):
        self.tracker = self.file = None
        if not is_main():
            return
        path = Path(args.output_dir, "log.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # steps after the checkpoint that a resumed run goes on from are trained, and logged, again; a last line may be cut short
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
        path.write_text("".join(kept))
        self.file = open(path, "a", buffering=1)
        if args.report_to != "none":
            try:
                self.tracker = importlib.import_module(args.report_to)
            except ImportError:
                raise ValueError(f"--report_to {args.report_to}: not installed; install it or pass --report_to none") from None
            options = {"project": args.project, "name": args.run_name, "config": config}
            if args.report_to == "wandb":
                options |= {"dir": args.output_dir, "mode": wandb_mode()}
            self.tracker.init(**options)
            if args.report_to == "wandb":
                self.tracker.define_metric("*", step_metric="train/global_step")  # as transformers does

    def write(self, record):
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        values = {key: value for key, value in record.items() if value is not None}
        say("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()))
        if self.tracker is not None:
            # transformers' names, so that the dense runs of the project are drawn in the same charts
            self.tracker.log({f"train/{key}": value for key, value in values.items()} | {"train/global_step": record["step"]})

    def close(self):
        if self.file is not None:
            self.file.close()
        if self.tracker is not None:
            self.tracker.finish()


def router_record(counts):
    """What of (layers, E) token counts goes in the log: the busiest expert's load over the mean, and experts without a token."""
    ratio = counts.max(dim=1).values / counts.double().mean(dim=1)
    return {
        "expert_load_max_over_mean": round(ratio.mean().item(), 3),
        "expert_load_worst_layer": round(ratio.max().item(), 3),
        "dead_experts": int((counts == 0).sum()),
    }


def print_batch_arithmetic(args, dataset, data_args, steps_an_epoch, total_steps):
    """Print, and assert, how packs become optimiser steps; returns the micro-batches of a rank and step."""
    world = dist.get_world_size()
    if args.global_batch_size % world:
        raise ValueError(f"--global_batch_size {args.global_batch_size} is not a multiple of {world} ranks")
    micro = args.global_batch_size // world
    assert world * micro == args.global_batch_size and steps_an_epoch * args.global_batch_size >= len(dataset)
    say(
        f"{world} ranks x {micro} packs, one at a time = {args.global_batch_size} packs a step = "
        f"{args.global_batch_size * data_args.max_seq_length:,} token places; {len(dataset):,} packs = {steps_an_epoch:,} steps an "
        f"epoch, {total_steps / steps_an_epoch:.4g} epochs = {total_steps:,} steps"
    )
    return micro


# ------------------------------------------------------------------------------------------------------------------------------
# A small mixture of experts for trying things out
# ------------------------------------------------------------------------------------------------------------------------------


def upcycle(dense_directory, out, num_experts=4, top_k=2, seed=0):
    """Write to `out` a Qwen2-MoE checkpoint that computes the same function as the Llama one in `dense_directory`.

    Every expert is a copy of the dense MLP and the router's top_k weights add up to one, so it does not matter which are chosen; the
    family's shared expert has pairs of equal neurons that cancel. The idea is sparse upcycling, arXiv 2212.05055. `out` is complete or
    not there at all. Raises ValueError if `dense_directory` is not there or `out` is, and for a model that is not Llama's or has biases.
    """
    from transformers import Qwen2MoeConfig

    if not os.path.isdir(dense_directory):
        raise ValueError(f"{dense_directory}: no such directory")
    if os.path.exists(out):
        raise ValueError(f"{out} is there already; remove it, or write to another directory")
    dense = AutoModelForCausalLM.from_pretrained(dense_directory, dtype="auto")
    old = dense.config
    if old.model_type != "llama" or old.attention_bias or old.mlp_bias or old.hidden_act != "silu":
        raise ValueError(f"{dense_directory}: a {old.model_type} model; expected a Llama model without biases and with SiLU")
    half = 32  # of the shared expert's neurons
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps"
    same += " max_position_embeddings rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id initializer_range"
    config = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in same.split()},
        qkv_bias=True,  # zeros: vLLM gives the family biases whatever its config says, and leaves them unset if they are not there
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        moe_intermediate_size=old.intermediate_size,
        shared_expert_intermediate_size=2 * half,
    )
    torch.manual_seed(seed)  # of the routers, and of the idle shared expert
    moe = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    weights, state = dense.state_dict(), moe.state_dict()
    for name, value in state.items():
        if name in weights:
            value.copy_(weights[name])
        elif name.endswith("experts.gate_up_proj"):
            mlp = name.removesuffix("experts.gate_up_proj")
            value.copy_(torch.cat([weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]]))  # to every expert
        elif name.endswith("experts.down_proj"):
            value.copy_(weights[f"{name.removesuffix('experts.down_proj')}down_proj.weight"])
        elif name.endswith("shared_expert.down_proj.weight"):  # not zeros: DoRA divides by the norm of a row
            value[:, half:] = -value[:, :half]
        elif "shared_expert." in name:
            value[half:] = value[:half]
        elif name.endswith("_proj.bias"):
            value.zero_()
    moe.generation_config = dense.generation_config
    part = f"{out}.part"
    moe.save_pretrained(part)
    AutoTokenizer.from_pretrained(dense_directory).save_pretrained(part)
    os.rename(part, out)


# ------------------------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = HfArgumentParser((TrainingArguments, multipack.DataArguments, adapter.LoraArguments))
    return parser.parse_args_into_dataclasses(argv)


def prepare_only(args, data_args):
    """Fetch the model, tokenise and pack, in this one process; print what is in the data."""
    plan.check_trainer(plan.load_config(args.model_name_or_path, args.model_revision), "moe")
    tokenizer = AutoTokenizer.from_pretrained(find_checkpoint(args.model_name_or_path, args.model_revision))
    dataset = multipack.prepare(data_args, tokenizer, args.model_name_or_path, seed=args.seed)
    print(multipack.format_report(dataset.report))


def dry_run(args, data_args, lora_args):
    """Print the plan of this run, from the model's config alone; a launcher's preparing process leaves that to the ranks."""
    if not args.prepare_only:
        config = plan.load_config(args.model_name_or_path, args.model_revision)
        plan.dry_run(config, **plan_arguments(args, data_args, lora_args))


def train(args, data_args, lora_args):
    """The run from a published checkpoint to adapters on disk. Raises ValueError for what the user can put right."""
    device = setup_distributed()
    mesh = make_mesh(device, args.shard_nodes)
    told_to_stop = []  # signals reach ranks at different times: a step's last all_reduce decides for all of them
    signal.signal(signal.SIGTERM, lambda *_: told_to_stop.append(1))
    resume_from = newest_checkpoint(args.output_dir, args.resume, resume_fault, say)

    config = plan.load_config(args.model_name_or_path, args.model_revision)
    plan.check_trainer(config, "moe")
    planned = settle_memory(config, args, data_args, lora_args)
    gemm_flops = plan.measure_gemm() if device.type == "cuda" else None
    directory = find_checkpoint(args.model_name_or_path, args.model_revision)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    dataset = multipack.prepare(data_args, tokenizer, args.model_name_or_path, seed=args.seed)
    steps_an_epoch = math.ceil(len(dataset) / args.global_batch_size)
    total_steps = args.max_steps or steps_an_epoch * args.num_train_epochs
    micro = print_batch_arithmetic(args, dataset, data_args, steps_an_epoch, total_steps)
    lock = claim(args.output_dir) if is_main() else None

    peft_model, model = build_model(config, args, lora_args)
    shard(model, mesh, args, lora_args.use_dora)
    load_weights(model.causal_lm, directory, torch.device("cpu") if args.cpu_offload else device)
    for module in model.modules():  # FSDP brings parameters to the device when they are needed, not buffers
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    reset_adapter(model.causal_lm, args.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, args)
    facts = {
        "seed": args.seed,
        "data": dataset.fingerprint,
        "global_batch_size": args.global_batch_size,
        "total_steps": total_steps,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "router_aux_loss_coef": args.router_aux_loss_coef,
        "r": lora_args.r,
        "lora_alpha": lora_args.alpha,
        "expert_r": lora_args.expert_rank(config),
        "use_dora": lora_args.use_dora,
        "lora_dropout": lora_args.lora_dropout,
    }
    checkpoints = Checkpointer(peft_model, model, optimizer, args, lora_args, tokenizer, facts)
    step = checkpoints.load(resume_from) if resume_from else 0
    say(f"training {sum(p.numel() for p in parameters):,} of {sum(p.numel() for p in model.parameters()):,} parameters")
    if resume_from:
        say(f"resuming from {resume_from}")
    log = Log(args, write_arguments(args, data_args, lora_args, dataset.fingerprint, planned) if is_main() else None, step)

    first_step = step + 1
    bar = tqdm(total=total_steps, initial=step, desc=args.run_name, unit="step", disable=not (is_main() and sys.stderr.isatty()))
    while step < total_steps:
        started = time.perf_counter()  # a step's speed is without the validation and the saving that follow it
        # data: this rank's packs, and the sizes of the whole step
        indices = packs_of_step(dataset, step, steps_an_epoch, args.global_batch_size)
        lengths = np.concatenate([dataset.lengths[dataset.packs[i]] for i in indices])
        batches = micro_batches(dataset, indices, micro)
        supervised = torch.tensor(float(sum(len(batch["targets"]) for batch in batches)), dtype=torch.float64).to(device)
        dist.all_reduce(supervised)
        data_wait = time.perf_counter() - started

        # one optimiser step; random numbers depend on the position alone
        torch.manual_seed(args.seed * 10**9 + step * dist.get_world_size() + dist.get_rank())
        totals = forward_backward(model, batches, supervised.clamp(min=1), args, device, len(indices))
        grad_norm = clip_gradients(parameters, args.max_grad_norm, mesh)
        lr = learning_rate(step, total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        model.forget_norms()
        step += 1

        # what happened: the step's only wait for the GPU
        totals = torch.cat([totals, totals.new_tensor([len(told_to_stop)])])
        dist.all_reduce(totals)
        loss, auxiliary, stop = totals.tolist()
        seconds = time.perf_counter() - started
        tokens, squares = int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum())
        flops = plan.train_flops(config, tokens, squares, lora_args.r, lora_args.expert_r, lora_args.use_dora)
        device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        record = {
            "step": step,
            "epoch": round(step / steps_an_epoch, 4),
            "loss": loss / max(supervised.item(), 1),
            "grad_norm": grad_norm.item(),
            "learning_rate": lr,
            "tokens": tokens,
            "supervised_tokens": int(supervised),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": plan.mfu(flops, seconds, dist.get_world_size(), device_name),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
            "data_wait": round(data_wait, 4),
            **router_record(model.router_load.take()),
        }
        if args.router_aux_loss_coef > 0:
            record["router_aux_loss"] = auxiliary / len(indices)
        end_of_epoch = step % steps_an_epoch == 0
        if dataset.validation is not None and (end_of_epoch or step == total_steps):
            record["validation_loss"] = validate(model, dataset.validation, device)
        log.write(record)
        bar.update()
        if step == first_step and gemm_flops:
            say(plan.compare_gemm(device_name, gemm_flops))
        if step == first_step and planned:
            say(plan.compare_peak(planned, torch.cuda.max_memory_allocated()))
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            raise ValueError(f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']}; nothing was saved from this step")
        if end_of_epoch or step == total_steps or stop or (args.save_steps and step % args.save_steps == 0):
            checkpoints.save(step)
        if stop:
            break

    checkpoints.wait()
    bar.close()
    log.close()
    if lock:
        lock.close()
    dist.barrier()
    if step < total_steps:
        say(f"stopped by SIGTERM after step {step}; go on with --resume")
    say(f"done: {args.output_dir}")


def main(argv=None):
    try:
        args, data_args, lora_args = parse(argv)
        if args.dry_run:
            dry_run(args, data_args, lora_args)
        elif args.prepare_only:
            prepare_only(args, data_args)
        else:
            train(args, data_args, lora_args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
