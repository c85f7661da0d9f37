"""The exit of a program that may be one of many processes: an error of one line, and a status. Imports no torch."""

import multiprocessing
import os
import signal
import sys

from distributed.launch import find_launch
from weight_selection.errors import InputError, printable


class RunError(RuntimeError):
    """A run that started well cannot go on, and all its processes know. The message is one line."""


class LocalError(RuntimeError):
    """This process cannot go on, and the others do not know why. The message is one line."""


class Stopped(BaseException):
    """A signal asked the run to stop. No handler of errors should take it for one.

    Args:
        number: of the signal.
        agreed: all processes stop at this step.
        saved: the checkpoint to go on from, if one was written.
        unless: options with which the same command does not go on from it.
    """

    def __init__(self, number, agreed=True, saved=None, unless=""):
        super().__init__(number, agreed, saved, unless)
        self.number, self.agreed, self.saved, self.unless = number, agreed, saved, unless

    def __str__(self):
        kept = "nothing was saved for it"
        if self.saved:
            kept = f"the same command{self.unless and f' without {self.unless}'} goes on from {self.saved}"
        return f"stopped by {signal.Signals(self.number).name}; {kept}"


REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later


def run_program(name, main):
    """Run ``main()`` and exit with a status, and for an error one line on stderr instead of a traceback.

    0: done. 1: ``RunError`` or ``LocalError``. 2: ``InputError``. 75: stopped by a signal of a scheduler, to go on
    later. 130: Ctrl-C. 141: who read the output has gone.

    Of what all processes know only the first of each machine prints the line; all of them exit with the status.
    """
    try:
        status, line, known_to_all = _outcome(main)
    finally:
        end_children()
    group = _process_group()
    if line is not None and (find_launch(os.environ).local_rank == 0 or not known_to_all):
        who = name if known_to_all else f"{name}, process {group.get_rank() if group else 0}"
        echoed = "\n" if status == 130 else ""  # after the terminal's ^C
        print(f"{echoed}{who}: {printable(line)[:2000]}", file=sys.stderr)
    if group:
        if status:  # the others may be gone, and closing would wait for them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        group.destroy_process_group()
    sys.exit(status)


def _process_group():
    """torch.distributed when this process is in a group, else None; a mistake in an option comes before its import."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None


def _outcome(main):
    """Run ``main()``; its exit status, what to print or None, and whether all processes know."""
    try:
        main()
        return 0, None, True
    except (InputError, RunError) as error:
        return 2 if isinstance(error, InputError) else 1, f"error: {error}", True
    except Stopped as stopped:
        return 130 if stopped.number == signal.SIGINT else REQUEUE, str(stopped), True
    except KeyboardInterrupt:
        return 130, "interrupted", True
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it flushes
        return 141, None, True
    except RuntimeError as error:
        reason = _local_fault(error)
        if reason is None:
            raise
        return 1, f"error: {reason}", False


def end_children():
    """Kill loader workers: one that hangs would keep this process too."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them
    for child in multiprocessing.active_children():
        child.kill()


def _local_fault(error):
    """What to say of an error that this process had alone; None if it is a mistake in the program.

    Torch has no classes for what gloo and its loader report.
    """
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, LocalError):
        return first
    if "DataLoader" in first:
        if first.startswith("Caught"):  # what the worker itself raised
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
