"""One process of many: where it stands among them, and how it ends, with a status and a line. Imports no torch."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weight_selection.errors import InputError, first_line, outcome, printable

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later


@dataclass(frozen=True)
class Launch:
    """This process's number (rank), how many there are, and its number on this machine, as its launcher says."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def find_launch(environ: Mapping[str, str], mpi: bool = False) -> Launch:
    """Read the launch from the environment that torchrun, SLURM's srun or Open MPI's mpirun sets.

    Open MPI's variables count only with ``mpi`` (``--dist_on_itp``), as a shell may have inherited them.

    Raises:
        InputError: ``mpi`` is set and the variables are missing.
    """
    if mpi:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        if any(name not in environ for name in names):
            raise InputError(f"--dist_on_itp true: not started by mpirun (no {names[0]}); leave the option out")
        return Launch(*(int(environ[name]) for name in names))
    if "RANK" in environ and "WORLD_SIZE" in environ:  # torchrun, python -m torch.distributed.launch
        return Launch(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0)))
    # srun sets the number of tasks of its step. The allocation's number (SLURM_NTASKS) does not count: a plain `python
    # main.py` in an allocation of 8 tasks is one process. It counts if somebody starts the tasks without srun, which
    # MASTER_ADDR tells.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS") if "MASTER_ADDR" in environ else None)
    if "SLURM_PROCID" in environ and tasks is not None and int(tasks) > 1:
        return Launch(int(environ["SLURM_PROCID"]), int(tasks), int(environ.get("SLURM_LOCALID", 0)))
    return Launch()


class RunError(RuntimeError):
    """A run that started well cannot go on, and all its processes know it. The message is one line."""


class LocalError(RuntimeError):
    """This process cannot go on, and the others do not know why. The message is one line."""


class Stopped(BaseException):
    """A signal asks the run to stop. It is no ``Exception``, so that no handler of errors catches it.

    If it is ``agreed``, all processes stop at this step, and can save a checkpoint together.
    """

    def __init__(self, number: int, agreed: bool):
        super().__init__(number, agreed)
        self.number, self.agreed = number, agreed
        self.advice = "nothing was saved for it"  # how the user goes on; changes when a checkpoint is saved

    def __str__(self):
        return f"stopped by {signal.Signals(self.number).name}; {self.advice}"


def run_program(name: str, main: Callable[[], None]) -> None:
    """Run ``main()`` and exit with a status; an error is one line on stderr instead of a traceback.

    0: done. 1: ``RunError`` or ``LocalError``. 2: ``InputError``. 75: stopped by a signal of a scheduler, to go on
    later. 130: Ctrl-C. 141: the reader of the output has gone.

    All processes exit with the status. When all of them know the error, only the first process of each machine prints
    the line.
    """
    try:
        status, line, known_to_all = _outcome(main)
    finally:
        end_children()
    distributed = sys.modules.get("torch.distributed")  # importing torch takes seconds
    group = distributed if distributed and distributed.is_initialized() else None
    if line is not None and (find_launch(os.environ).local_rank == 0 or not known_to_all):
        who = name if known_to_all else f"{name}, process {group.get_rank() if group else 0}"
        newline = "\n" if status == 130 else ""  # the terminal has printed ^C
        print(f"{newline}{who}: {printable(line)[:2000]}", file=sys.stderr)
    if group:
        if status:  # the others may have gone, and closing the group would wait for them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        time.sleep(0.1)  # PyTorch 2.6 waits in the next line for threads that may wait for Python: let them end first
        group.destroy_process_group()
    sys.exit(status)


def _outcome(main):
    """Run ``main()``; returns its exit status, the line to print or None, and whether all processes know the error."""
    try:
        return *outcome(main), True
    except RunError as error:
        return 1, f"error: {error}", True
    except Stopped as stopped:
        return 130 if stopped.number == signal.SIGINT else REQUEUE, str(stopped), True
    except RuntimeError as error:
        reason = _local_fault(error)
        if reason is None:
            raise
        return 1, f"error: {reason}", False


def end_children() -> None:
    """Kill the loader workers: this process could not end while one of them hangs."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their deaths
    for child in multiprocessing.active_children():
        child.kill()


def _local_fault(error):
    """The message for an error that only this process has; None if the error is a mistake in the program.

    Torch has no exception classes for the errors of gloo and of loader workers, so their texts tell them apart.
    """
    first = first_line(error)
    if isinstance(error, LocalError):
        return first
    if "DataLoader" in first:
        if first.startswith("Caught"):  # the last line is the worker's own error
            first = str(error).strip().splitlines()[-1]
            if not any(word in first for word in ("No space left", "shared memory", "memory map")):
                return None
        return (
            f"--num_workers: {first}; out of memory, of shared memory, or slower than --timeout; run it again to go on"
        )
    distributed = sys.modules.get("torch.distributed")
    if not (distributed and isinstance(error, distributed.DistError) or "gloo" in str(error).lower()):
        return None
    what = "does not answer (--timeout)" if "timed out" in first.lower() else "is gone"
    return (
        f"another process {what}: look for the one that says something else, or nothing; started again, the run goes "
        f"on from its last checkpoint ({first})"
    )
