"""Distributed set-up, checkpoints, logging and the error users see. Nothing here knows about models or data."""

import argparse
import contextlib
import datetime
import errno
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from timm.utils import ParseKwargs
from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: the option, its value, what to do."""


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


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and reports what is wrong in one line."""

    def __init__(self, program, description):
        super().__init__(
            prog=program,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise InputError(f"{message}; see --help")


class Kwargs(ParseKwargs):
    """timm's ``K=V ...`` arguments, with an error for a word without ``=``."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string} {value}: write NAME=VALUE")
        super().__call__(parser, namespace, values, option_string)


def boolean(text):
    """Value of an option that takes true or false."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


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
    if line is not None and (find_launch(os.environ).local_rank == 0 or not known_to_all):
        who = name if known_to_all else f"{name}, process {dist.get_rank() if dist.is_initialized() else 0}"
        echoed = "\n" if status == 130 else ""  # after the terminal's ^C
        print(f"{echoed}{who}: {printable(line)[:2000]}", file=sys.stderr)
    if dist.is_initialized():
        if status:  # the others may be gone, and closing would wait for them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


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


def printable(text):
    """A text in one line, without the control characters that a stranger's file may have put into it."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))


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
    if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
        return None
    what = "does not answer (--timeout)" if "timed out" in first.lower() else "is gone"
    return (
        f"another process {what}: look for the one that says something else, or nothing; started again, the run goes "
        f"on from its last checkpoint ({first})"
    )


# ---------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Launch:
    """Where this process stands among all processes of the run, as its launcher says."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def find_launch(environ, mpi=False):
    """Read rank, world size and local rank from the environment of torchrun, SLURM's srun or Open MPI's mpirun.

    Args:
        environ: mapping such as ``os.environ``.
        mpi: trust Open MPI's variables (``--dist_on_itp``); they also exist in shells that only inherited them.

    Raises:
        InputError: MPI was asked for and its variables are missing.
    """
    if mpi:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        if any(name not in environ for name in names):
            raise InputError(
                "--dist_on_itp true: not started by mpirun (no OMPI_COMM_WORLD_RANK); leave the option out"
            )
        return Launch(*(int(environ[name]) for name in names))
    if "RANK" in environ and "WORLD_SIZE" in environ:  # torchrun, python -m torch.distributed.launch
        return Launch(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0)))
    # A step's own count first: inside an allocation of 8 tasks, a plain `python main.py` is still one process.
    # srun sets it. Where somebody else played srun's part, MASTER_ADDR tells that several processes were meant.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS") if "MASTER_ADDR" in environ else None)
    if "SLURM_PROCID" in environ and tasks is not None and int(tasks) > 1:
        return Launch(int(environ["SLURM_PROCID"]), int(tasks), int(environ.get("SLURM_LOCALID", 0)))
    return Launch()


def slurm_master(environ):
    """Address and port all tasks of a SLURM job agree on: its first node, and a port derived from the job's number."""
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    if "[" in nodes:  # node[01-04]: only scontrol knows how to expand it
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout
    return nodes.replace(",", " ").split()[0], str(20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000)


def init_distributed(launch, device, url, timeout):
    """Join the process group (NCCL on GPUs, gloo on CPUs) when there is more than one process.

    Args:
        launch: this process's place.
        device: where it computes.
        url: where the processes meet.
        timeout: seconds to wait for another process; NCCL, which then aborts without a word of ours, waits longer.
    """
    if launch.world_size == 1:
        return
    if url == "env://" and "MASTER_ADDR" not in os.environ:
        if "SLURM_PROCID" not in os.environ:
            raise InputError(
                f"--dist_url {url}: MASTER_ADDR and MASTER_PORT are not set; start with torchrun or set both"
            )
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm_master(os.environ)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = datetime.timedelta(seconds=timeout + (60 if device.type == "cuda" else 0))
    store, *_ = next(dist.rendezvous(url, launch.rank, launch.world_size, timeout=patience))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        store = store_of_attempt(store, launch, timeout)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        timeout=patience,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
    )


def store_of_attempt(store, launch, timeout):
    """The part of a store that only the processes of this attempt use.

    torchrun keeps one store when it restarts processes. The addresses of those that it killed still stand there, and
    who reads them waits for ever. So the first process names the attempt, the others answer with names of their own,
    and an attempt is this one when the first has read this process's name in it.

    Raises:
        LocalError: the first process has not come in time.
    """
    name, end = uuid.uuid4().hex, time.monotonic() + timeout
    if launch.rank == 0:
        store.set("attempt", name)
        others = [store.get(f"{name}/{rank}").decode() for rank in range(1, launch.world_size)]
        store.set(f"{name}/all", " ".join(others))
        return dist.PrefixStore(name, store)
    while time.monotonic() < end:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{launch.rank}", name)
        if store.check([f"{attempt}/all"]) and name in store.get(f"{attempt}/all").decode().split():
            return dist.PrefixStore(attempt, store)
        time.sleep(0.05)
    raise LocalError(f"--timeout {timeout}: the first process has not come")


def is_main():
    """True in the one process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def main_only(action):
    """Run ``action()`` in the main process alone; what it returns, or its InputError or RunError, comes to all."""
    if not dist.is_initialized():
        return action()
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = action()
        except (InputError, RunError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def main_first(action):
    """Run ``action()`` in the main process and then in the others; an InputError of the first is raised in all."""
    result = []
    main_only(lambda: result.extend([action()]))
    return result[0] if result else action()


def seed_everything(*numbers):
    """Seed Python, numpy and torch from a tuple of non-negative integers.

    Training seeds with (seed, epoch, image) before augmenting an image and with (seed, epoch, micro-batch) before
    computing on a micro-batch. What is drawn then depends on no worker, process or interruption.
    """
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


# ---------------------------------------------------------------------------------------------------------
# Files


def sha256(path):
    """SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(path, option):
    """Raise an InputError that names ``option`` unless ``path`` is a file."""
    if not Path(path).is_file():
        raise InputError(f"{option} {path}: no such file")


PARTIAL = ".partial-"  # begins the name of a file that is being written


@contextlib.contextmanager
def new_file(path):
    """Give a temporary path beside ``path`` to write to; it takes the place of ``path`` only if the block succeeds.

    At every moment, even when the power fails, ``path`` is the whole old file or the whole new one.

    Raises:
        InputError: the operating system refused (permissions, full disk, a directory of that name).
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL, suffix=f"-{path.name}")
        os.close(handle)
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would hide results from the rest of a group
        _to_disk(temporary)
        os.replace(temporary, path)
        try:
            _to_disk(path.parent)
        except OSError as error:  # some network file systems know no such thing
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Write ``value`` as indented JSON, all of it or nothing."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def check_writable(directory, option):
    """Create ``directory`` if need be and make sure files can be made in it.

    Raises:
        InputError: they cannot; the message names ``option``.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"{option} {directory}: cannot write there ({error.strerror}); name another directory"
        ) from error


def versions():
    """Versions of what a result depends on."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }


def save_torch(value, path):
    """``torch.save``, with an OSError whatever the reason that the file cannot be written. Use within ``new_file``."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch hides a full disk behind a message about its archive writer
        raise OSError(f"is the disk full? {str(error).splitlines()[0]}") from error


# ---------------------------------------------------------------------------------------------------------
# Logging


def say(*words):
    """Print in the main process only."""
    if is_main():
        tqdm.write(" ".join(str(word) for word in words))
        sys.stdout.flush()


def duration(seconds):
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


class Progress:
    """Progress through ``total`` steps: a bar with the time left on a terminal, else ``lines`` lines with it.

    ``done`` of them were done before.
    """

    def __init__(self, header, total, lines=5, done=0):
        self.header, self.total = header, total
        self.every = max(1, total // lines) if lines else math.inf
        self.first, self.done, self.start = done, done, time.monotonic()
        self.bar = None
        if is_main() and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=header, leave=False, dynamic_ncols=True)

    def step(self, describe):
        """Count one step. ``describe()`` gives the text; it is called only when something is shown."""
        self.done += 1
        shown = self.done % self.every == 0 or (self.done == self.total and self.every <= self.total)
        if self.bar is not None:
            if shown or self.done % 10 == 0:
                self.bar.set_postfix_str(describe(), refresh=False)
            self.bar.update()
        elif shown and is_main():
            left = (time.monotonic() - self.start) / (self.done - self.first) * (self.total - self.done)
            say(f"{self.header} [{self.done:>{len(str(self.total))}}/{self.total}] {describe()} eta {duration(left)}")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()


def describe(figures):
    """Names and values in one line."""
    words = (
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
    return ", ".join(words)
