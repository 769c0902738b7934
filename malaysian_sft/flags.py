"""Command lines: HfArgumentParser's, where every mistake is one line that names the flag and, of an unknown one, the
nearest that there is; and which values flags may have."""

import argparse
import difflib
import math
import sys


class OneLineParser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def error(self, message):
        raise ValueError(message)


def parse_flags(kinds, args=None):
    """The dataclasses `kinds`, filled from the command line or from the list `args`. Raises ValueError where argparse
    would print its usage and exit."""
    from transformers import HfArgumentParser  # seconds, and not for every process of an engine

    class Parser(OneLineParser, HfArgumentParser):
        pass

    parser = Parser(kinds, allow_abbrev=False)
    refuse_unknown(parser._option_string_actions, sys.argv[1:] if args is None else args)
    return parser.parse_args_into_dataclasses(args)


def refuse_unknown(known, words):
    """Raise ValueError for the first flag in a command line's words that is not in `known`."""
    for word in words:
        flag = word.split("=")[0]
        if flag.startswith("--") and len(flag) > 2 and flag not in known:
            near = difflib.get_close_matches("--" + flag[2:].replace("-", "_"), known, 1, 0.5)
            words = f"did you mean {near[0]}?" if near else "--help lists those that there are"
            raise ValueError(f"unknown flag {flag}: {words}")


# flag -> (what is expected, in words; whether a value is that). None, where a flag has no value, is always right.
# A flag of several programs means the same in all of them.
POSITIVE = "a positive number", lambda value: 0 < value < math.inf
NOT_NEGATIVE = "a number of at least 0", lambda value: 0 <= value < math.inf
SHARE = "a number of at least 0 and less than 1", lambda value: 0 <= value < 1
PART = "a number above 0 and up to 1", lambda value: 0 < value <= 1
VALUES = {
    # train_dense.py and train_moe.py
    **dict.fromkeys("num_train_epochs global_batch_size learning_rate max_grad_norm ddp_timeout".split(), POSITIVE),
    **dict.fromkeys("save_steps logging_steps shard_nodes max_skipped_steps".split(), POSITIVE),
    **dict.fromkeys("lora_alpha per_device_train_batch_size".split(), POSITIVE),
    **dict.fromkeys("r expert_r".split(), ("a positive number, at most 16,384", lambda value: 0 < value <= 16_384)),
    **dict.fromkeys(
        "warmup_steps weight_decay router_aux_loss_coef frugal_layers transposed_layers".split(), NOT_NEGATIVE
    ),
    "seed": ("a number of at least 0 and less than 2^32", lambda value: 0 <= value < 2**32),
    "lora_dropout": SHARE,
    # malaymmlu.py and calculate_malaymmlu.py
    **dict.fromkeys("samples max_tokens max_model_len gpu_partition num_gpus limit max_num_seqs".split(), POSITIVE),
    **dict.fromkeys("start_timeout hang_timeout log_every".split(), POSITIVE),
    **dict.fromkeys("temperature retries restarts restart_backoff audit".split(), NOT_NEGATIVE),
    "resamples": ("10 to 100,000; 2,000 is enough for 95 %", lambda value: 10 <= value <= 100_000),
    **dict.fromkeys("top_p gpu_memory_utilization".split(), PART),
    "top_k": ("a number of at least -1; -1 and 0 take all tokens", lambda value: value >= -1),
    # plan.py
    **dict.fromkeys("gpus nodes gpu_memory dataset_tokens document_length".split(), POSITIVE),
    "reserve": NOT_NEGATIVE,
    # multipack.py and adapter.py
    "show": NOT_NEGATIVE,
    "workers": POSITIVE,
}


def check_values(*groups):
    """Raise ValueError for the first flag in these groups of arguments whose value none can have."""
    for group in groups:
        for name, (expected, holds) in VALUES.items():
            value = getattr(group, name, None)
            if value is not None and not holds(value):
                raise ValueError(f"--{name} {value}: expected {expected}")
