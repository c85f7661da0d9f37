"""A process ends with the process that started it, so that no orphan goes on or joins a later run. Imports no torch."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def end_with_launcher(environ: Mapping[str, str]) -> None:
    """Let this process be killed when torchrun, which started it, is gone. Call it as early as possible.

    Only torchrun (also as ``python -m torch.distributed.launch``) names its runs in ``TORCHELASTIC_RUN_ID``. SLURM and
    mpirun end their processes themselves. A process that a shell started may outlive it (nohup, disown).

    If torchrun ended before this call, process 1 has most likely adopted this process. In a container torchrun can be
    process 1 itself, but then both run the same Python.

    Raises:
        SystemExit: torchrun ended before this call.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return
    parent = os.getppid()
    if parent == 1 and not _runs_this_python(parent):
        sys.exit("main.py: error: torchrun, which started this process, is gone; start it again")
    end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """Let this process be killed when its parent, the process with this id, is gone, however that ended.

    Linux kills this process as soon as the *thread* that started it ends. That is right for torchrun and main.py: both
    start their processes in the main thread. Elsewhere a thread of this process looks once a second.

    It is SIGKILL, because a graceful stop would wait for other processes that may be gone, and would hold the output
    directory while the next run wants it. A run may be killed at any moment without a loss.
    """
    if sys.platform != "linux":
        threading.Thread(target=_die_when_orphaned, args=(parent,), daemon=True).start()
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the call, which then has no effect
        os.kill(os.getpid(), signal.SIGKILL)


def _die_when_orphaned(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _runs_this_python(process):
    try:
        return Path(f"/proc/{process}/exe").samefile(sys.executable)
    except OSError:  # it belongs to another user, or this is not Linux
        return False
