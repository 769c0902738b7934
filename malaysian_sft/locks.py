"""A file that one process holds at a time."""

import fcntl
import os
import sys


def hold(path, busy=None):
    """Keep other processes out while the file that is returned is open; the kernel closes it when the process dies.

    busy: what to say, as ValueError, if another process (its number is appended) is there; None: wait for it, and say
    so on stderr.
    """
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        if busy is not None:
            file.close()
            raise ValueError(f"{busy} (process {owner})") from None
        print(f"waiting for process {owner}, which holds {path}", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
