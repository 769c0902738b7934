"""Command lines: HfArgumentParser's, where every mistake is one line that names the flag and, of an unknown one, the
nearest that there is."""

import difflib
import math

from transformers import HfArgumentParser


class Parser(HfArgumentParser):
    """Raises ValueError where argparse would print its usage and exit; takes no abbreviations."""

    def __init__(self, kinds, **options):
        super().__init__(kinds, allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(message)

    def parse_args_into_dataclasses(self, args=None, **options):
        self._refuse_unknown(args)
        return super().parse_args_into_dataclasses(args, **options)

    def _refuse_unknown(self, args):
        import sys

        known = self._option_string_actions
        for word in sys.argv[1:] if args is None else args:
            flag = word.split("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in known:
                names = {name.replace("-", "_"): name for name in known if name.startswith("--")}
                near = difflib.get_close_matches(flag.replace("-", "_"), names, 1, 0.5)
                words = f"did you mean {names[near[0]]}?" if near else "--help lists those that there are"
                raise ValueError(f"unknown flag {flag}: {words}")


def parse(kinds, args=None):
    """The dataclasses `kinds`, filled from the command line or from the list `args`. Raises ValueError."""
    return Parser(kinds).parse_args_into_dataclasses(args)


# What numbers a flag may have, in words; whether a value is one.
POSITIVE = "a positive number", lambda value: 0 < value < math.inf
NOT_NEGATIVE = "a number of at least 0", lambda value: 0 <= value < math.inf
SHARE = "a number of at least 0 and less than 1", lambda value: 0 <= value < 1
PART = "a number above 0 and up to 1", lambda value: 0 < value <= 1


def check_values(expected, *groups):
    """Raise ValueError for the first flag in these groups of arguments whose value none can have.

    expected: {flag: one of the pairs above}. None, where a flag has no value, is always right.
    """
    for group in groups:
        for name, (words, holds) in expected.items():
            value = getattr(group, name, None)
            if value is not None and not holds(value):
                raise ValueError(f"--{name} {value}: expected {words}")
