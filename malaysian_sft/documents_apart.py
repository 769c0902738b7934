"""A check of the model itself, before it trains: packed documents must not see each other.

Softmax attention is told where documents begin. Linear attention, state-space and convolution layers carry a state
along the sequence; unless they are told too, it flows from one document into the next, and nothing else shows it.
"""

import inspect
import sys

import torch

FIRST, SECOND = 9, 7  # tokens of two short documents in one pack
# Of a token's hidden state, relative: what rounding may change when the other document does, a router's choice of
# experts included. The leaks that are known change 96 % and more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}


def takes_document_numbers(model) -> bool:
    """Whether some layer of transformers' file asks for `seq_idx`, the number of the document that a token is in."""
    return "seq_idx" in inspect.getsource(sys.modules[type(model).__module__])


def with_document_numbers(batch):
    """collate's batch and `seq_idx`, int32 (1, T)."""
    return batch | {"seq_idx": (batch["position_ids"] == 0).cumsum(dim=-1, dtype=torch.int32) - 1}


@torch.no_grad()
def check_documents_apart(causal_lm, forward):
    """Raise ValueError, naming the first module where it happens, if a document's hidden states depend on the document
    before it in a pack.

    causal_lm: transformers' model, however adapted or sharded; forward(pack) runs it in evaluation mode, as the trainer
    would, on a list of documents in which nothing is supervised. Two packs differ in their first document alone; what
    the modules of the decoder layers give for the second must be the same. Collective where the model is sharded: every
    rank takes the same tokens.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = causal_lm.get_input_embeddings().num_embeddings
    first, other, second = (torch.randint(vocabulary, (n,), generator=generator) for n in (FIRST, FIRST, SECOND))
    layers = causal_lm.base_model.layers
    names = {module: name for name, module in causal_lm.named_modules()}
    watched = [module for layer in layers for module in (layer, *layer.children())]
    runs = []
    for tokens in (first, other):
        seen = {}

        def keep(module, _, output, seen=seen):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor) and output.numel() % (FIRST + SECOND) == 0:
                seen[module] = output.reshape(FIRST + SECOND, -1)[FIRST:].float()

        hooks = [module.register_forward_hook(keep) for module in watched]
        forward([{"input_ids": ids, "labels": torch.full_like(ids, -100)} for ids in (tokens, second)])
        for hook in hooks:
            hook.remove()
        runs.append(seen)
    if not all(layer in runs[0] for layer in layers):
        raise ValueError(
            f"{type(causal_lm).__name__}: what its layers give is not (tokens, width): not checked for leaks"
        )
    dtype = min(causal_lm.parameters(), key=lambda p: p.requires_grad).dtype  # the base's; adapters are fp32
    for module, hidden in runs[0].items():  # in the order in which they ran
        change = (hidden - runs[1][module]).norm(dim=-1) / hidden.norm(dim=-1).clamp_min(1e-12)
        if change.max() > TOLERANCE[dtype]:
            raise ValueError(
                f"documents in a pack see each other in {names[module]} ({type(module).__name__}): a document's hidden"
                f" states change by {change.max():.0%} with the document before it. This layer is not told where"
                " documents begin; install its kernels (causal-conv1d, flash-linear-attention, mamba-ssm) if it takes"
                " seq_idx or cu_seq_lens, or train another model"
            )
