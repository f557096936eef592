"""Run as a script between us and a child: asks the kernel to end the child with its parent, then becomes the child.

`trampoline.py PARENT_PID PROGRAM ARGUMENT...`. The kernel sends SIGTERM, which lets Redis flush, when the parent's
thread ends for whatever reason, kill -9 included; the request survives exec. Needs nothing but the standard library, so
that the interpreter starts in isolated mode without a site directory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent_pid: int) -> None:
    """Let the kernel send SIGTERM when the parent dies; leave at once if it has died already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(number)}")
    if os.getppid() != parent_pid:
        sys.exit(f"the parent {parent_pid} is gone already")


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
