"""Processes that train together, seeds, and what a run prints. Nothing here knows about models or data."""

import datetime
import math
import os
import random
import subprocess
import sys
import time
import uuid

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from tqdm import tqdm

from program import InputError, LocalError, RunError

# ---------------------------------------------------------------------------------------------------------
# Processes


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


def seed_host(*numbers):
    """Seed Python, numpy and torch on the CPU from a tuple of non-negative integers; returns torch's seed.

    For loader workers: ``torch.manual_seed`` looks for accelerators each time, which takes longer than all the rest.
    """
    words = [int(word) for word in np.random.SeedSequence(numbers).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    return words[2]


def seed_everything(*numbers):
    """Seed Python, numpy and torch on all devices from a tuple of non-negative integers.

    Training seeds with (seed, epoch, image) before augmenting an image and with (seed, epoch, micro-batch) before
    computing on a micro-batch. What is drawn then depends on no worker, process or interruption.
    """
    torch.manual_seed(seed_host(*numbers))


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
