"""torchrun, with one line at the end in place of its tracebacks: `python3 -m malaysian_sft.launch <torchrun's flags>`.

A rank that fails says why, and nothing follows. Killed ranks are named here. SIGTERM and SIGINT go to every rank, which
saves and stops; they get TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds for it.
"""

import logging
import os
import signal
import sys

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

DEFAULTS = {
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # torchrun's own 30 s are less than a step and a save
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # torchrun's own default, without its notice
}


def failure_line(error):
    """What is left to say of failed ranks, None if they said it: a rank that was killed couldn't."""
    for rank, failure in sorted(error.failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            lack = ", as the kernel does for lack of memory" if name == "SIGKILL" else ""
            return f"error: the process of rank {rank} was killed ({name}{lack}); go on with --resume"
    return None


def main(argv=None):
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.disable(logging.CRITICAL)  # torchrun's own reports of what ranks have said
    args = parse_args(argv)
    try:
        run(args)
    except ChildFailedError as error:
        line = failure_line(error)
        sys.exit(line or max(1, error.get_first_failure()[1].exitcode))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except DistNetworkError:
        sys.exit(
            f"error: cannot listen or connect at {args.master_addr}:{args.master_port}: on one node another run has"
            " the port, set MASTER_PORT; on several, see that MASTER_ADDR is the first one's and reachable"
        )


if __name__ == "__main__":
    main()
