"""torchrun, with one line at the end in place of its tracebacks: `python3 -m malaysian_sft.launch <torchrun's flags>`.

A rank that fails says why, and nothing follows. Killed ranks are named here. SIGTERM and SIGINT go to every rank, which
saves and stops; they get TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds for it.

On one node nothing of a run can be reached from another machine: the ranks meet and talk on the loopback interface,
where torchrun would listen on all. Several nodes have to trust their network: see SECURITY.md.
"""

import errno
import logging
import os
import re
import signal
import socket
import sys
import uuid
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from malaysian_sft.watchdog import HUNG

DEFAULTS = {
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # torchrun's own 30 s are less than a step and a save
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # torchrun's own default, without its notice
    # packs differ in length: what one leaves free in fixed segments does not fit the next, and more is held
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
LOOPBACK = "127.0.0.1"
# what gloo and NCCL take to find each other on; NCCL's data goes over NVLink or shared memory all the same
ON_ONE_NODE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
WHY_KILLED = {
    "SIGKILL": ", as the kernel does for lack of memory",
    "SIGABRT": ", as NCCL does when another rank does not answer",
}
# torchrun's flag -> (the variable that a launcher takes it from, what is expected, as a pattern)
NUMBERS = {
    "--nproc_per_node": ("NUM_GPUS", "a positive number", r"0*[1-9]\d*|auto|cpu|gpu|xpu"),
    "--nnodes": ("NNODES", "a positive number", r"0*[1-9]\d*(:0*[1-9]\d*)?"),
    "--node_rank": ("NODE_RANK", "0 for the first node, 1 for the next", r"\d+"),
    "--master_port": ("MASTER_PORT", "a number of at most 65,535", r"\d+"),
}
WAIT = 900  # seconds for the other nodes, unless --rdzv_conf timeout=N says otherwise


class Loopback(StaticTCPRendezvous):
    """The meeting of the ranks of one node, at a socket that listens on the loopback interface only."""

    def __init__(self, listening, run_id):
        super().__init__(LOOPBACK, listening.getsockname()[1], 0, 1, run_id, WAIT)
        self.listening = listening

    def get_backend(self):
        return "loopback"

    def next_rendezvous(self):
        if self._store is None:
            self._store = TCPStore(
                self.master_addr,
                self.master_port,
                1,
                True,
                timedelta(seconds=WAIT),
                multi_tenant=True,
                master_listen_fd=self.listening.detach(),
            )
        place = RendezvousStoreInfo(self.master_addr, self.master_port)
        return RendezvousInfo(PrefixStore(self.run_id, self._store), 0, 1, place)


def meet_on_loopback(args):
    """Have torchrun's arguments `args`, of one node, use `Loopback`. Raises ValueError if another has the port."""
    port = 0 if args.standalone or args.master_port is None else args.master_port  # 0: any that is free
    try:
        listening = socket.create_server((LOOPBACK, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ValueError(f"cannot listen at {LOOPBACK}:{port}: {error.strerror}") from None
        raise ValueError(f"cannot listen at {LOOPBACK}:{port}: another run has the port; set MASTER_PORT") from None
    for name, value in ON_ONE_NODE.items():
        os.environ.setdefault(name, value)
    rendezvous_handler_registry.register("loopback", lambda parameters: Loopback(listening, parameters.run_id))
    args.standalone, args.rdzv_backend, args.rdzv_id = False, "loopback", str(uuid.uuid4())
    args.rdzv_endpoint = f"{LOOPBACK}:{listening.getsockname()[1]}"


def check_numbers(words):
    """Raise ValueError for the first of NUMBERS in torchrun's flags `words` that torchrun could not use."""
    words = words[: words.index("--")] if "--" in words else words
    given = {flag: word for flag, word in zip(words, words[1:], strict=False) if flag in NUMBERS}
    for flag, word in given.items():
        variable, expected, pattern = NUMBERS[flag]
        if not re.fullmatch(pattern, word) or (flag == "--master_port" and int(word) > 65_535):
            raise ValueError(f"{variable} (or {flag}) is {word!r}: expected {expected}")
    nodes, rank = given.get("--nnodes", ""), given.get("--node_rank", "0")
    if nodes.isdigit() and int(rank) >= int(nodes):
        raise ValueError(f"NODE_RANK (or --node_rank) is {rank}: expected 0 to {int(nodes) - 1}, as NNODES is {nodes}")


def say_who_is_waited_for(args):
    """Before torchrun waits for the other nodes, which it does without a word."""
    if "timeout=" not in args.rdzv_conf:
        args.rdzv_conf = ",".join(filter(None, [args.rdzv_conf, f"timeout={WAIT}"]))
    seconds = args.rdzv_conf.split("timeout=")[-1].split(",")[0]
    print(
        f"node {args.node_rank} of {args.nnodes}: waiting for the others at {args.master_addr}:{args.master_port},"
        f" {seconds} s at most; each is started with the same NNODES and MASTER_ADDR and its own NODE_RANK",
        file=sys.stderr,
        flush=True,
    )


def failure_line(error):
    """What is left to say of failed ranks, None if they said it: a rank that was killed couldn't."""
    if any(failure.exitcode == HUNG for failure in error.failures.values()):
        return None
    for rank, failure in sorted(error.failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            why = WHY_KILLED.get(name, "")
            return f"error: the process of rank {rank} was killed ({name}{why}); go on with --resume"
    return None


def set_defaults(environment):
    """Put `DEFAULTS` into a dict of environment variables, where the user has said nothing else."""
    asked = "PYTORCH_ALLOC_CONF" in environment  # the newer name
    for name, value in DEFAULTS.items():
        if not (asked and name == "PYTORCH_CUDA_ALLOC_CONF"):
            environment.setdefault(name, value)


def main(argv=None):
    set_defaults(os.environ)
    logging.disable(logging.CRITICAL)  # torchrun's own reports of what ranks have said
    try:
        check_numbers(sys.argv[1:] if argv is None else argv)
        args = parse_args(argv)
        if parse_min_max_nnodes(args.nnodes) == (1, 1):
            meet_on_loopback(args)
        elif args.rdzv_backend == "static":
            say_who_is_waited_for(args)
        run(args)
    except ChildFailedError as error:
        line = failure_line(error)
        sys.exit(line or max(1, error.get_first_failure()[1].exitcode))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except (DistNetworkError, DistStoreError) as error:
        came = f" ({str(error).splitlines()[0]})" if "clients joined" in str(error) else ""
        sys.exit(
            f"error: the nodes did not meet at {args.master_addr}:{args.master_port}{came}: start each with the same"
            " NNODES, MASTER_PORT and MASTER_ADDR, the first one's and reachable, and its own NODE_RANK; or another run"
            " has the port, set MASTER_PORT"
        )


if __name__ == "__main__":
    main()
