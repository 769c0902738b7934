"""The base model: where it is (a directory or the hub), its config, and whether it is the one that an adapter was
trained on."""

import os
from pathlib import Path

import torch

from malaysian_sft.disk_names import attach, common_name, disk_names
from malaysian_sft.fp8 import BLOCK
from malaysian_sft.lora import DISK_NAME, EXPERT, base_shapes
from malaysian_sft.safetensors_files import read_sources, tensor_checksum

# What two configs must share for an adapter to fit; read from the base's config when saving and compared when
# verifying.
SHAPE_FIELDS = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    " vocab_size num_experts n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size"
    " shared_expert_intermediate_size first_k_dense_replace"
).split()


def shape_fields(config) -> dict:
    """The SHAPE_FIELDS that a config, or the text part of a composite one, has; {} for None."""
    config = config and config.get_text_config()
    return {key: getattr(config, key) for key in SHAPE_FIELDS if getattr(config, key, None) is not None}


def shapes_of_base(name) -> dict[str, tuple[int, int]]:
    """base_shapes of a model from its config, and its checkpoint's names if that is on this machine."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name).get_text_config())
    name_as_on_disk(model, name)
    return base_shapes(model)


def name_as_on_disk(model, base):
    """Note on `model`, not adapted yet, its weights' names in the checkpoint of `base` (a directory or hub id)."""
    attach(model)
    directory = local_base(base)
    if directory is not None and any(directory.glob("*.safetensors")):
        disk_names(model).use(read_sources(directory))


def base_faults(manifest, base, revision=None) -> list[str]:
    """How `base`, a directory or hub id, differs from what an adapter's manifest recorded of its base, in lines; [] if
    it does not."""
    trained_on, faults = manifest.get("base_model"), []
    config = load_config(base, revision)
    found, fp8 = shape_fields(config), block_fp8(base, config.to_dict())
    was_fp8 = (manifest.get("base_quantisation") or {}).get("quantised") == "checkpoint"
    if manifest and fp8 != was_fp8:
        kinds = {True: "quantised to FP8", False: "not quantised"}
        faults.append(f"base {base}: it is {kinds[fp8]}; the adapter was trained on {trained_on}, {kinds[was_fp8]}")
    for key, value in manifest.get("base_config", {}).items():
        if found.get(key) != value:
            faults.append(
                f"base {base}: {key} is {found.get(key)}; the adapter was trained on {trained_on}, where it is {value}"
            )
    recorded = manifest.get("base_tensors", {})
    directory = local_base(base)
    if recorded and directory and not faults:
        now = _row_checksums(directory, list(recorded))
        for name, checksum in recorded.items():
            if now.get(name) != checksum:
                faults.append(f"base {base}: {name} is not that of {trained_on}: this is another base model's adapter")
                break
    return faults


def local_base(name, revision=None) -> Path | None:
    """The directory of a base model that is on this machine, given as a directory or a hub id; None if it is not."""
    if os.path.isfile(os.path.join(name, "config.json")):
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(str(name), "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def hub_commit(name, revision=None) -> str | None:
    """The hub's commit of a base model that was downloaded, None of a directory."""
    found = local_base(name, revision)
    return None if found is None or found == Path(name) else found.name  # .../snapshots/<commit>


def base_fingerprint(base_model, keys) -> dict[str, str]:
    """Checksums of the first row of up to 16 adapted base weights, to tell apart bases of the same shape; {} if the
    base is not here."""
    directory = local_base(base_model)
    modules = sorted({DISK_NAME.match(key)["module"] for key in keys})
    modules = [module for module in modules if not EXPERT.match(common_name(module))]
    chosen = [modules[i * len(modules) // 16] for i in range(16)] if len(modules) > 16 else modules
    return _row_checksums(directory, [f"{module}.weight" for module in dict.fromkeys(chosen)]) if directory else {}


def _row_checksums(directory, names) -> dict[str, str]:
    """Checksum of each named weight's first row in bf16: a base saved in fp32 equals its bf16 copy. Names not found are
    left out."""
    from safetensors import safe_open

    wanted, checksums = set(names), {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in wanted & set(file.keys()):
                checksums[name] = tensor_checksum(file.get_slice(name)[:1].to(torch.bfloat16))
    return checksums


# What a base model's directory is made of; other formats of the same weights stay on the hub.
BASE_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]


def find_base(name, revision=None) -> Path:
    """The directory of a base model given as a directory or a hub id, downloaded if it is not on this machine yet.

    Launchers call this in one process (--prepare_only) before the ranks do, which then only find it. Raises ValueError
    if there is none.
    """
    if os.path.isfile(os.path.join(name, "config.json")):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=BASE_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name}: neither a directory with a config.json nor on the hub ({str(error).splitlines()[0]})"
        ) from None


def block_fp8(name, config: dict, supported=True) -> bool:
    """Whether a config (as a dict) is of a checkpoint in FP8 as fp8.py describes it. Raises ValueError for any other
    quantisation, and for this one too unless `supported`."""
    found = config.get("quantization_config")
    if not found:
        return False
    found = found if isinstance(found, dict) else found.to_dict()
    kind, expected = found.get("quant_method"), {"fmt": "e4m3", "activation_scheme": "dynamic"}
    stated = {key: found.get(key, value) for key, value in expected.items()}
    stated["weight_block_size"], expected["weight_block_size"] = found.get("weight_block_size"), [BLOCK, BLOCK]
    if kind == "fp8" and stated == expected and supported:
        return True
    how = f" with {stated}; of FP8, {expected} is read" if kind == "fp8" and stated != expected else ""
    raise ValueError(f"{name}: the base is quantised ({kind}){how}; take the bf16 checkpoint that it was made from")


# What transformers raises for files that make no sense to it, beside its own errors.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Sizes beyond any model, which would take a machine's memory or hours to find out.
LARGEST = {"num_hidden_layers": 2000, "hidden_size": 10**6, "intermediate_size": 10**7, "vocab_size": 10**8}
LARGEST |= {"num_attention_heads": 10**5, "num_experts": 10**5, "num_local_experts": 10**5, "n_routed_experts": 10**5}


def load_config(name, revision=None):
    """The transformers config of a hub id, a directory or a config.json file. Raises ValueError, in one line, if there
    is none, if it asks for code of its own, or if it cannot be a model's."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        text = config.get_text_config()
    except (*UNREADABLE, StrictDataclassError) as error:
        what = (str(error) or type(error).__name__).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            what = "the model is code that comes with it, which is not run; only models of transformers are trained"
        elif not os.path.exists(name):
            what = f"no such directory here; asked for at the hub: {what}"
        raise ValueError(f"{name}: no config that transformers can read ({what})") from None
    if not isinstance(text, PreTrainedConfig):
        raise ValueError(f"{name}: config.json's text_config is {text!r}; expected an object")
    for key, largest in LARGEST.items():
        value = getattr(text, key, None)
        if value is not None and not (type(value) is int and 0 <= value <= largest):
            raise ValueError(f"{name}: config.json says {key} is {value!r}; expected an integer up to {largest:,}")
    return config


def load_tokenizer(name, revision=None):
    """The tokenizer of a hub id or a directory. Raises ValueError, in one line, if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself, and no class below it, for a file it can't read
        if type(error) is not Exception and not isinstance(error, UNREADABLE):
            raise  # a fault of the code, not of the file
        what = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"{name}: no tokenizer that transformers can read ({what})") from None
