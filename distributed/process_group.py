"""How processes that train together meet, and what one does for all."""

import datetime
import os
import subprocess
import time
import uuid

import torch
import torch.distributed as dist

from distributed.program import LocalError, RunError
from utils import is_main
from weight_selection.errors import InputError


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
