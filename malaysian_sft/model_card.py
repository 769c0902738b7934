"""The model card of an adapter directory, and its upload to the hub."""

import json
import os
import re
from pathlib import Path

from malaysian_sft.adapter_files import is_tokenizer_file
from malaysian_sft.lora import CONFIG, MANIFEST, WEIGHTS
from malaysian_sft.verify import verify_adapter


def model_card(directory, config: dict, scores: str | None = None) -> str:
    """README.md of an adapter directory: base, data, hyper-parameters and commit from the run's args.json (beside or
    above), and scores."""
    directory, run = Path(directory), {}
    for path in (folder / "args.json" for folder in (directory, *directory.absolute().parents[:2])):
        if path.is_file():
            run = json.loads(path.read_text())
            break
    arguments, base = run.get("arguments", {}), config.get("base_model_name_or_path")
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    front = ["library_name: peft", f"base_model: {base}", "tags:", "- lora", "- malaysian", "language:", "- ms", "- en"]
    if dataset := arguments.get("dataset"):
        front += ["datasets:", *(f"- {name.strip()}" for name in str(dataset).split(","))]
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {run.get('launcher', directory.absolute().parent.name)}, {directory.name}",
        "",
    ]
    lines += [
        (
            f"A {kind} adapter of [{base}](https://huggingface.co/{base})."
            if not os.path.isdir(str(base))
            else f"A {kind} adapter of {base}."
        ),
        "",
    ]
    rows = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        **{f"rank of {k}": v for k, v in (config.get("rank_pattern") or {}).items()},
    }
    rows |= {
        key: value
        for key, value in arguments.items()
        if key not in ("r", "lora_alpha", "use_dora") and isinstance(value, (int, float, str))
    }
    if run.get("commit"):
        rows["commit"] = run["commit"]
    lines += ["| | |", "|---|---|", *(f"| {key} | `{value}` |" for key, value in rows.items()), ""]
    if scores:
        lines += ["## Scores", "", "```", scores.strip(), "```", ""]
    lines += [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "<this repository>")',
        "```",
        "",
    ]
    if config.get("use_dora"):
        lines += [
            (
                "vLLM and other servers do not take DoRA adapters: merge it first (`python adapter.py merge`) or load"
                " it merged."
            ),
            "",
        ]
    return "\n".join(lines)


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
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(
        folder_path=directory, repo_id=repository, allow_patterns=files, commit_message=f"Upload {directory.name}"
    )
    return files
