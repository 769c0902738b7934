"""The time of an optimiser step, as a sum of components: work counted from the config, over rates that were measured.

    work(config, plan)           what a GPU does in a step, by component: FLOPs, bytes, layers launched
    fit(profiles)                rates of a device from profiled steps of known work
    known_rates(device, records) a device's rates in results/rates.json, or those of a device of the same chip
    step_time(work, rates)       milliseconds by component, their sum and its range

How work is counted. A micro-batch is micro_batch packs of T tokens. FLOPs as account.py counts them, plus what is
computed twice. Bytes of element-wise passes: each pass over (T, width) reads or writes 2 bytes an element; the factors
below are the passes of attention_half.py, norm_rope.py and moe_swiglu.py, of Liger's kernels and of PEFT's and DoRA's
forward, backward included. A document costs attention as if it were FLOOR tokens longer: tiles that its length does not
fill, and the start of each.

What overlaps. The host launches while the GPU computes: the longer of the two counts, and somewhat more where they are
alike, as gaps then open at times (`together`). A gather that runs beside products slows them by about its own time on
the link: two H200 took 134 ms more a pack for 142 ms of it. So links are added; a range begins where they were free.
Ranks wait for the one whose documents are longest, pack by pack.
"""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

from malaysian_sft.account import (
    architecture,
    attention_pairs,
    attention_width,
    computed_again,
    dense_level,
    peak_flops,
    scored_again,
)
from malaysian_sft.memory import fp8_bytes, weights

FLOOR = 1050  # tokens; by packs of several lengths in results/step.json, for both attention kernels alike
# GB/s of memory, and GB/s of the links between a node's GPUs in one direction (NVIDIA's data sheets).
BANDWIDTH = (("H200", 4800, 450), ("H100", 3350, 450), ("B200", 8000, 900), ("A100", 2039, 300))
NODE_LINK = 50.0  # GB/s a GPU between nodes: a 400 Gb/s port each
IDLE = 0.02  # of a GPU's work: gaps while all of it is queued, 13 to 17 ms a pack in results/step.json
DORA_LAUNCHES = 1.36  # kernels of a pack with DoRA over those with LoRA: 10,600 and 7,781 in results/step.json
ALIKE = 6.0  # exponent of the norm that joins GPU and host
SPREAD = 0.35  # standard deviation of what attention does for a pack, over its mean, in packs of log-normal documents
UNMEASURED = {"more than two GPUs": 0.10, "several nodes": 0.20}  # added to the end of a range

# What a step's components are called, and in what their work is counted.
UNITS = {
    "experts: products": "FLOPs",
    "experts: products in FP8": "FLOPs",
    "experts: passes": "bytes",
    "dense products": "FLOPs",
    "attention": "FLOPs",
    "element-wise passes": "bytes",
    "optimiser": "bytes",
    "links": "link bytes",
    "node links": "link bytes",
    "host": "layers",
}
# Components of results/step.json's profiles that make up each of ours.
MEASURED = {
    "experts: products": ("experts: products",),
    "experts: passes": ("experts: SwiGLU, gradients", "experts: routing, combine"),
    "dense products": ("dense products",),
    "attention": ("attention",),
    "element-wise passes": ("norms, rotary", "SwiGLU", "copies", "other", "router", "loss"),
}
IN_FP8 = "experts: products in FP8"  # of a profile what MEASURED has no row for: see `fp8_rate`
SHORTER = {
    IN_FP8: "fewer recomputed (--frugal_layers 0, more memory)",
    "experts: products": "products in FP8, or fewer recomputed (--frugal_layers 0, more memory)",
    "experts: passes": "a smaller --expert_r; the passes are bound by memory",
    "dense products": "--activations none, or GPUs with more memory for it: less is computed twice",
    "attention": "flash-attn-4 on Hopper; shorter documents",
    "element-wise passes": "--activations none; LoRA, if it is DoRA",
    "optimiser": "a larger --global_batch_size, or a smaller rank",
    "links": "--gather_base False where it fits; more packs a GPU and step; faster links",
    "node links": "a larger --global_batch_size; faster links between nodes",
    "host, not hidden": "a faster CPU; longer packs; LoRA, if it is DoRA, whose layers launch more",
    "waiting for the longest documents": "fewer GPUs, or shorter documents",
    "gaps": "longer packs",
}


@dataclass
class Rates:
    """What one device does a second, what its host needs a layer, and where that is known from: a record of
    results/rates.json."""

    device: str
    rates: dict  # component -> FLOP/s or byte/s; attention has one a kernel ("attention, flash-attn-4")
    host_ms: dict  # "one GPU" or "several GPUs" -> ms a layer with LoRA, forward and backward
    origin: str
    tolerance: float = 0.10  # of a step's time

    def record(self):
        return {"part": "rates"} | asdict(self)


def experts_work(config, plan):
    """(FLOPs, FLOPs of those products that are in FP8, bytes) of the routed experts in one micro-batch: products, and
    the passes between them."""
    tokens, fp8 = plan["micro_batch"] * plan["max_seq_length"], plan["expert_arithmetic"] == "fp8"
    flops = base = passed = 0
    for m in architecture(config).matrices:
        if m.kind != "expert":
            continue
        size, inner = m.out_features * m.in_features, plan["expert_r"] * (m.out_features + m.in_features)
        frugal = plan["memory_mode"] == "frugal" or m.layer < plan["frugal_layers"]
        down = m.name.endswith("down_proj")
        # how often base and adapter are multiplied; frugal: gate and up again, and of down what A makes
        again = (plan["activations"] == "full") + (frugal and not down)
        flops += tokens * m.active * (6 + 2 * again) * inner
        base += tokens * m.active * (4 + 2 * again) * size
        if frugal and down:
            flops += tokens * m.active * 2 * plan["expert_r"] * m.in_features
        if m.name.endswith("down_proj"):
            rows, hidden, width = tokens * m.active, m.out_features, m.in_features
            # combine writes and reads H twice, SwiGLU's backward passes I ten times; DoRA scales and reads what it kept
            elements = 4 * hidden + 10 * width + plan["use_dora"] * (2 * hidden + 4 * width)
            passed += 2 * rows * (elements + (plan["activations"] == "full") * 2 * hidden)
            # a byte each of a, and of the gradients of gate and up; x and dout by tokens: two bytes read, one written
            passed += fp8 * (3 * rows * width + 6 * tokens * hidden)
    return (flops, base, passed) if fp8 else (flops + base, 0, passed)


def dense_flops(config, plan):
    """FLOPs of every other product of one micro-batch: projections, MLPs, router and head, and their adapters."""
    tokens = plan["micro_batch"] * plan["max_seq_length"]
    policy, flops = plan["activations"], 0
    for m in architecture(config).matrices:
        if m.kind in ("expert", "embedding"):
            continue
        size, inner = m.out_features * m.in_features, m.adapted * plan["r"] * (m.out_features + m.in_features)
        again = computed_again(plan["kind"], policy, plan["frugal_layers"], m)
        flops += tokens * ((4 + 2 * again) * size + (6 + 2 * again) * inner)
    return flops


def attention_flops(config, plan):
    """FLOPs of the scores of one micro-batch; a document counts FLOOR tokens more than it has."""
    tokens = plan["micro_batch"] * plan["max_seq_length"]
    pairs = attention_pairs(config, tokens, tokens * (plan["document_length"] + FLOOR))
    again = scored_again(config, plan["kind"], plan["activations"], plan["frugal_layers"])
    return (12 + 4 * again) * attention_width(config) * pairs


def stored_in_fp8(config, plan):
    """(weights, their bytes) of the experts that are stored in FP8."""
    experts = [m for m in architecture(config).matrices if m.kind == "expert" and plan["base_dtype"] == "fp8"]
    return sum(map(weights, experts)), fp8_bytes(experts)


def passed_bytes(config, plan):
    """Bytes of the element-wise passes of one micro-batch, and of the casts and sums of the adapters' gradients."""
    tokens, hidden = plan["micro_batch"] * plan["max_seq_length"], config.hidden_size
    dense, elements = plan["kind"] == "dense", 0
    for number, layer in enumerate(architecture(config).layers()):
        # widths of a token's passes: forward of the attention half and of the MLP half, all of the backward
        attention, mlp, backward = 7 * hidden, 3 * hidden, 20 * hidden
        for m in layer:
            # DoRA scales an output, and in the backward its gradient, and sums the product of both
            scaled = 2 * m.out_features * (plan["use_dora"] and m.adapted and m.kind != "expert")
            backward += 2 * scaled
            if m.kind == "attention":
                attention += scaled
            else:
                mlp += scaled
            if m.name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                attention += 2 * m.out_features
                backward += 3 * m.out_features
            if m.kind in ("mlp", "shared_expert") and "down_proj" in m.name:
                mlp += (3 if dense else 5) * m.in_features
                backward += (6 if dense else 7) * m.in_features
        policy = dense_level(plan["activations"], number, plan["frugal_layers"]) if dense else plan["activations"]
        again = {"none": 0, "selective": 0 if dense else attention, "full": attention + mlp}[policy]
        elements += attention + mlp + backward + again
    head, wide = 4 * config.vocab_size, stored_in_fp8(config, plan)[0]
    if plan["transposed_layers"]:  # those are transposed once
        wide *= 1 - plan["transposed_layers"] / config.num_hidden_layers
    copies = plan["gpus"] * plan["nodes"] if plan["kind"] == "dense" and plan["zero3"] else 1
    # experts in FP8 are widened, a byte to two, once in the forward and once in the backward; those that compute so are
    # transposed in the backward, a byte to one
    widened = wide * (2 if plan["expert_arithmetic"] == "fp8" else 2 * 3)
    return 2 * tokens * (elements + head) + 18 * plan["parameters"]["trainable"] / copies + widened


def link_bytes(config, plan):
    """Bytes that a GPU receives: (in a micro-batch, in a step on top, in a step from copies of the model elsewhere)."""
    counts, gpus = plan["parameters"], plan["gpus"] * plan["nodes"]
    adapter = counts["trainable"]
    if gpus == 1:
        return 0.0, 0.0, 0.0
    others = (gpus - 1) / gpus
    if plan["kind"] == "dense":
        if not plan["zero3"]:
            return 0.0, 8 * adapter * others, 0.0
        return (2 * 2 * (counts["total"] + adapter) + 4 * adapter) * others, 0.0, 0.0
    shard = plan["gpus"] * plan["shard_nodes"]
    inside = (shard - 1) / shard
    outside = sum(counts["base"].get(k, 0) for k in ("embedding", "head"))
    micro = 2 * (4 if plan["use_dora"] else 2) * adapter * inside
    if plan["gather_base"]:
        wide, stored = stored_in_fp8(config, plan)
        micro += 2 * (2 * (counts["total"] - outside - wide) + stored) * inside
    reduced = 4 * adapter * inside
    between = 8 * adapter / shard if plan["nodes"] > plan["shard_nodes"] else 0
    if plan["reduce_every_micro_batch"]:
        return micro + reduced, 0.0, between
    return micro, reduced, between


def work(config, plan):
    """What one GPU does, by component: {"micro": {component: amount}, "step": the same for what happens once a step,
    "micro_batches": how many}. Units as in UNITS."""
    config = config.get_text_config()
    products, in_fp8, passes = experts_work(config, plan)
    micro, once, between = link_bytes(config, plan)
    shard = plan["gpus"] * (plan["nodes"] if plan["kind"] == "dense" else plan["shard_nodes"])
    return {
        "micro": {
            "experts: products": products,
            **({IN_FP8: in_fp8} if in_fp8 else {}),
            "experts: passes": passes,
            "dense products": dense_flops(config, plan),
            "attention": attention_flops(config, plan),
            "element-wise passes": passed_bytes(config, plan),
            "links": micro,
            "host": config.num_hidden_layers * (DORA_LAUNCHES if plan["use_dora"] else 1),
        },
        # AdamW reads four fp32 values of a parameter and writes three, clipping reads one and passes one
        "step": {"optimiser": 40 * plan["parameters"]["trainable"] / shard, "links": once, "node links": between},
        "micro_batches": plan["accumulation"],
        "kind": plan["kind"],
        "gpus": plan["gpus"] * plan["nodes"],
        "nodes": plan["nodes"],
        "sharing_nodes": plan["nodes"] if plan["kind"] == "dense" else plan["shard_nodes"],
    }


def fit(profiles):
    """{component: rate} from profiled micro-batches: an iterable of (`work`'s dict of that micro-batch, its record of
    results/step.json). Kernels that ran beside a gather were slowed by it and are left out where there are others."""
    profiles = list(profiles)
    quiet = [(done, record) for done, record in profiles if not record["gather_base"]] or profiles
    amounts, seconds = {}, {}
    for done, record in quiet:
        for component, parts in MEASURED.items():
            name = f"attention, {record['attention']}" if component == "attention" else component
            amounts[name] = amounts.get(name, 0.0) + done["micro"][component]
            seconds[name] = seconds.get(name, 0.0) + sum(record["components_ms"].get(p, 0.0) for p in parts) / 1e3
    rates = {name: amounts[name] / seconds[name] for name in amounts}
    if "attention, varlen_attn" in rates:  # PyTorch's own is flash-attention 2's kernel
        rates.setdefault("attention, flash-attn-2", rates["attention, varlen_attn"])
    return rates | {"optimiser": rates["element-wise passes"]}


def fp8_rate(done, record, rates):
    """FLOP/s of the experts' products in FP8, of a profiled micro-batch (as `fit`'s): what the adapters' products, by
    `rates`, leave of the time."""
    seconds = record["components_ms"]["experts: products"] / 1e3
    return done["micro"][IN_FP8] / (seconds - done["micro"]["experts: products"] / rates["experts: products"])


def host_key(gpus):
    """The key of `Rates.host_ms` for so many GPUs."""
    return "one GPU" if gpus == 1 else "several GPUs"


def host_table(records):
    """`Rates.host_ms` from records with `host_ms_a_layer` and `gpus`, of layers that ran fused."""
    found = {}
    for r in records:
        if r.get("fused", True):
            launches = DORA_LAUNCHES if r["adapter"] == "dora" else 1
            found.setdefault(host_key(r["gpus"]), []).append(r["host_ms_a_layer"] / launches)
    return {key: sum(values) / len(values) for key, values in found.items()}


def data_sheet(device):
    """(memory, links) of a device in GB/s, by its CUDA name; None for one that the table doesn't know."""
    return next((tuple(figures) for word, *figures in BANDWIDTH if word in device), None)


def known_rates(device, records):
    """The `Rates` of a device, by its CUDA name, from results/rates.json's records (the last of the device), or None.

    Without a record of its own a device takes those of another with the same peak (H100 and H200 are one chip), what
    is counted in bytes by the memory bandwidth on both data sheets, and a wider range.
    """
    records = [r for r in records if r.get("part") == "rates"]
    names = [f.name for f in Rates.__dataclass_fields__.values()]
    own = [r for r in records if r["device"] == device]
    if own:
        return Rates(**{name: own[-1][name] for name in names if name in own[-1]})
    peak = peak_flops(device)
    alike = [r for r in records if peak is not None and peak_flops(r["device"]) == peak and data_sheet(r["device"])]
    if not alike or data_sheet(device) is None:
        return None
    other = Rates(**{name: alike[-1][name] for name in names if name in alike[-1]})
    by_memory = data_sheet(device)[0] / data_sheet(other.device)[0]
    rates = {name: rate * (by_memory if UNITS.get(name) == "bytes" else 1) for name, rate in other.rates.items()}
    if "links" in rates:
        rates["links"] = other.rates["links"] * data_sheet(device)[1] / data_sheet(other.device)[1]
    origin = f"{other.origin}, measured on {other.device}; bytes by memory bandwidth"
    return Rates(device, rates, other.host_ms, origin, other.tolerance + 0.05)


def together(gpu_ms, host_ms):
    """Milliseconds that a GPU's work and the host that launches it take together."""
    return (gpu_ms**ALIKE + host_ms**ALIKE) ** (1 / ALIKE)


def slowest(ranks):
    """How many standard deviations the largest of so many normal draws is above their mean, on average (Blom)."""
    return 0.0 if ranks == 1 else NormalDist().inv_cdf(0.5264 ** (1 / ranks))


def lacks(done, rates, attention):
    """What of `rates` the step that `done` is of would take and is not there, in words."""
    wanted = (
        {*MEASURED, "optimiser"} - {"attention"}
        | {f"attention, {attention}"}
        | ({IN_FP8} & done["micro"].keys())
        | ({"links"} if done["gpus"] > 1 else set())
    )
    return sorted(wanted - rates.rates.keys()) + sorted({host_key(done["gpus"])} - rates.host_ms.keys())


def through_a_port(done):
    """Share of what a GPU receives that comes through its port from other nodes, so small that it is never 0.

    A ring over all GPUs brings into a node what the others hold, once, through the ports of all its GPUs together.
    """
    nodes, gpus = done["sharing_nodes"], done["gpus"] // done["nodes"]
    everything = (nodes * gpus - 1) / (nodes * gpus)
    return max((nodes - 1) / nodes / gpus / everything, 1e-9) if nodes > 1 else 1e-9


def step_time(done, rates, attention="varlen_attn"):
    """The time of an optimiser step: {"components": {name: ms}, "micro_batches", "ms": their sum, "low", "high",
    "largest": name, "shorter": what would shorten that}. done: `work`'s dict; attention: the kernel, by attention.py's
    names. Raises ValueError where a rate that it takes is not known."""
    if missing := lacks(done, rates, attention):
        raise ValueError(f"no rate of {', '.join(missing)} on {rates.device}; measure it with plan.py --measure")
    link = min(rates.rates.get("links", math.inf), 1e9 * NODE_LINK / through_a_port(done))
    of = rates.rates | {
        "attention": rates.rates[f"attention, {attention}"],
        "links": link,
        "node links": 1e9 * NODE_LINK,
    }
    count = done["micro_batches"]
    pack = {name: 1e3 * amount / of[name] for name, amount in done["micro"].items() if name != "host"}
    if done["gpus"] > 1:
        pack["waiting for the longest documents"] = SPREAD * slowest(done["gpus"]) * pack["attention"]
    gpu = sum(pack.values())
    host = done["micro"]["host"] * rates.host_ms[host_key(done["gpus"])]
    pack["gaps"] = IDLE * gpu
    pack["host, not hidden"] = together(gpu, host) - gpu
    total = {name: count * ms for name, ms in pack.items()}
    for name, amount in done["step"].items():
        total[name] = total.get(name, 0.0) + 1e3 * amount / of[name]
    total = {name: ms for name, ms in sorted(total.items(), key=lambda item: -item[1]) if ms > 1e-3}
    ms, largest = sum(total.values()), next(iter(total))
    tolerance = rates.tolerance
    beyond = UNMEASURED["several nodes" if done["nodes"] > 1 else "more than two GPUs"] * (done["gpus"] > 2)
    return {
        "components": total,
        "micro_batches": count,
        "ms": ms,
        "low": (1 - tolerance) * (ms - total.get("links", 0.0)),
        "high": (1 + tolerance + beyond) * ms,
        "largest": largest,
        "shorter": SHORTER[largest],
    }
