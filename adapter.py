"""Adapters: which layers get LoRA, and everything that happens to the trained weights afterwards.

    python adapter.py verify  DIR [--base MODEL]              one line per fault, exit code 1 if there is any
    python adapter.py merge   BASE DIR OUT [--workers N]      base + adapter -> an ordinary checkpoint in OUT
    python adapter.py convert DIR OUT --layout stacked|2d     between per-expert tensors and PEFT's stacks
    python adapter.py card    DIR [--scores FILE]             (re)write the model card DIR/README.md
    python adapter.py push    DIR OWNER/NAME [--dry_run]      verify, then upload to the hub

An adapter is a PEFT directory: adapter_config.json and adapter_model.safetensors, plus adapter_manifest.json with a
checksum per tensor and a fingerprint of the base. Tensor names are the base checkpoint's; routed experts are
two-dimensional, one per expert and projection. fp32 on disk unless asked otherwise: fp32 is what was trained, and
rounding B A to bf16 would move the weights by more than many late steps did.

vLLM evaluates an adapter at the base's full speed, without a merged copy on disk, through the load format
"merge_adapter" (see register_vllm_loader):

    LLM(model=BASE, load_format="merge_adapter", model_loader_extra_config={"adapter": DIR})
"""

import sys
from pathlib import Path

import torch

from malaysian_sft.adapter_files import Adapter, read_adapter_config
from malaysian_sft.convert import convert_adapter
from malaysian_sft.flags import OneLineParser, check_values, refuse_unknown
from malaysian_sft.merge import merge_adapter
from malaysian_sft.model_card import push_adapter, write_card
from malaysian_sft.verify import norm_table, verify_adapter


def _parse(arguments):
    parser = OneLineParser(
        prog="adapter.py", description="Verify, merge, convert, describe and publish adapters.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="one line per fault, exit code 1 if there is any", allow_abbrev=False)
    verify.add_argument("directory")
    verify.add_argument(
        "--base",
        help="base model, directory or hub id (default: the one in the configuration, if it is on this machine)",
    )
    verify.add_argument(
        "--allow_zero", action="store_true", help="accept lora_B that is zero throughout (saved before the first step)"
    )
    merge = commands.add_parser("merge", help="write base + adapter as an ordinary checkpoint", allow_abbrev=False)
    merge.add_argument("base")
    merge.add_argument("adapter")
    merge.add_argument("out")
    merge.add_argument(
        "--any_base", action="store_true", help="merge even if the base is not the one that was trained on"
    )
    merge.add_argument("--workers", type=int, help="processes (default: one per core, at most 8)")
    convert = commands.add_parser("convert", help="change the layout of the experts, or the dtype", allow_abbrev=False)
    convert.add_argument("directory")
    convert.add_argument("out")
    convert.add_argument("--layout", choices=("2d", "stacked"), default="2d")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"))
    card = commands.add_parser("card", help="(re)write the model card", allow_abbrev=False)
    card.add_argument("directory")
    card.add_argument("--scores", help="text file with what calculate_malaymmlu.py printed")
    push = commands.add_parser(
        "push", help="verify and upload to the hub (log in with `hf auth login` first)", allow_abbrev=False
    )
    push.add_argument("directory")
    push.add_argument("repository", help="OWNER/NAME")
    push.add_argument("--private", action="store_true")
    push.add_argument("--dry_run", action="store_true", help="list the files, send nothing")
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in commands.choices:
        refuse_unknown(commands.choices[words[0]]._option_string_actions, words[1:])
    args = parser.parse_args(words)
    check_values(args)
    return args


def main(arguments=None) -> None:
    try:
        args = _parse(arguments)
        if args.command == "verify":
            faults = verify_adapter(args.directory, args.base, args.allow_zero)
            for fault in faults:
                print(f"error: {fault}", file=sys.stderr)
            if faults:
                sys.exit(1)
            print("root mean square of lora_B x 1e4 (experts: least/mean/most)")
            print(norm_table(args.directory))
            print(f"{args.directory}: sound, {len(Adapter(args.directory).slots)} weights adapted")
        elif args.command == "merge":
            merge_adapter(args.base, args.adapter, args.out, args.workers, args.any_base)
        elif args.command == "convert":
            convert_adapter(args.directory, args.out, args.layout, args.dtype and getattr(torch, args.dtype))
            print(f"wrote {args.out}")
        elif args.command == "card":
            scores = Path(args.scores).read_text() if args.scores else None
            print(f"wrote {write_card(args.directory, read_adapter_config(args.directory), scores)}")
        else:
            push_adapter(args.directory, args.repository, args.private, args.dry_run)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
