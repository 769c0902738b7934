"""The model card of an adapter directory, and its upload to the hub."""

import json
import os
import re
from pathlib import Path

import pandas as pd

from malaysian_sft.adapter_files import is_tokenizer_file
from malaysian_sft.lora import CONFIG, MANIFEST, WEIGHTS
from malaysian_sft.run import FACTS
from malaysian_sft.safetensors_files import writing
from malaysian_sft.verify import verify_adapter

USE = """
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "<this repository>")
```
"""
# The arguments that make an adapter what it is. A run has a hundred: devices, hub, directories of one machine.
DESCRIBED = (
    "dataset dataset_config dataset_revision max_seq_length loss_on bad_rows ignore_columns validation_share"
    " model_revision num_train_epochs max_steps"
).split() + [name for name in FACTS if name not in ("r", "lora_alpha", "use_dora")]
DORA_NOTE = """
vLLM and other servers do not take DoRA adapters: merge it first (`python adapter.py merge`) or load it merged.
"""


def on_the_hub(name) -> bool:
    """Whether a name may be a hub id: the hub refuses others in a card, and links what only looks like one."""
    return not os.path.exists(name) and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None


def model_card(directory, config: dict, scores: str | None = None) -> str:
    """README.md of an adapter directory: base, data, hyper-parameters and commit from the run's args.json (beside or
    above), and scores."""
    from huggingface_hub import ModelCardData

    directory, run = Path(directory), {}
    for path in (folder / "args.json" for folder in (directory, *directory.absolute().parents[:2])):
        if path.is_file():
            run = json.loads(path.read_text())
            break
    arguments, base = run.get("arguments", {}), config.get("base_model_name_or_path")
    datasets = [name.strip() for name in str(arguments.get("dataset") or "").split(",") if name.strip()]
    data = ModelCardData(
        base_model=base if on_the_hub(str(base)) else None,
        library_name="peft",
        tags=["lora", "malaysian"],
        language=["ms", "en"],
        datasets=[name for name in datasets if on_the_hub(name)] or None,
    )
    described = f"[{base}](https://huggingface.co/{base})" if on_the_hub(str(base)) else base
    rows = {"rank": config["r"], "alpha": config["lora_alpha"]}
    rows |= {f"rank of {name}": rank for name, rank in (config.get("rank_pattern") or {}).items()}
    rows |= {name: arguments[name] for name in DESCRIBED if arguments.get(name) not in (None, "")}
    rows |= {"commit": run["commit"]} if run.get("commit") else {}
    table = pd.DataFrame({"": [f"`{value}`" for value in rows.values()]}, index=list(rows))
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {run.get('launcher', directory.absolute().parent.name)}, {directory.name}\n",
        f"A {'DoRA' if config.get('use_dora') else 'LoRA'} adapter of {described}.\n",
        f"{table.to_markdown(disable_numparse=True)}\n",
        f"## Scores\n\n```\n{scores.strip()}\n```\n" if scores else "",
        f"## Use\n{USE.format(base=base)}{DORA_NOTE if config.get('use_dora') else ''}",
    ]
    return "\n".join(part for part in parts if part)


def write_card(directory, config: dict, scores: str | None = None) -> Path:
    """Write the model card of an adapter directory; returns its path. One that is there stays until this one is
    whole."""
    path = Path(directory, "README.md")
    card = model_card(directory, config, scores)
    temporary = path.with_name("README.md.tmp")
    try:
        with writing(directory):
            temporary.write_text(card)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


PUSHED = (CONFIG, WEIGHTS, MANIFEST, "README.md", "generation_config.json")


def push_adapter(directory, repository, private=False, dry_run=False, log=print) -> list[str]:
    """Verify the adapter and upload it to the hub as `repository` (OWNER/NAME); returns the files. dry_run lists them
    and sends nothing."""
    directory = Path(directory)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository!r}: expected OWNER/NAME")
    if faults := verify_adapter(directory):
        raise ValueError("; ".join(faults[:5]))
    files = sorted(path.name for path in directory.iterdir() if path.name in PUSHED or is_tokenizer_file(path.name))
    for name in files:
        log(f"{(directory / name).stat().st_size:>15,}  {repository}/{name}")
    if dry_run:
        log("dry run: nothing was sent")
        return files
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=directory, repo_id=repository, allow_patterns=files, commit_message=f"Upload {directory.name}"
        )
    except httpx.TransportError as error:  # no OSError, as what the hub answers is
        raise ValueError(
            f"{repository}: the hub cannot be reached ({error}); the same command sends it later"
        ) from None
    return files
