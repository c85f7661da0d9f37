"""How processes that train together meet, and how one of them acts for all."""

import datetime
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from distributed.program import Launch, LocalError, RunError
from utils import is_main
from weight_selection.errors import InputError


def slurm_master(environ: Mapping[str, str]) -> tuple[str, str]:
    """Address and port where all tasks of a SLURM job meet: its first node, and a port that its job number decides."""
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    if "[" in nodes:  # only scontrol can expand a list such as node[01-04]
        command = ["scontrol", "show", "hostnames", nodes]
        nodes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return nodes.replace(",", " ").split()[0], str(20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000)


def init_distributed(launch: Launch, device: torch.device, url: str, timeout: float) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs) at ``url`` when there is more than one process.

    ``timeout`` is in seconds. NCCL waits a minute longer for a process, so that our own message comes first.

    Raises:
        InputError: the launcher does not say where the processes meet.
        LocalError: another process has not come in time.
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
    wait = datetime.timedelta(seconds=timeout + (60 if device.type == "cuda" else 0))
    store, *_ = next(dist.rendezvous(url, launch.rank, launch.world_size, timeout=wait))
    store = store_of_start(store, launch, timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=wait, store=store, rank=launch.rank, world_size=launch.world_size)


def store_of_start(store: dist.Store, launch: Launch, timeout: float) -> dist.Store:
    """The part of a store that only the processes of this start use.

    A store can hold what the processes of an earlier start wrote: torchrun keeps one store when it restarts them, and a
    file (``--dist_url file://``) outlives them. A process that reads the address of a killed one waits for ever.

    So all processes of a start need a name that no other start has. The environment gives none: the address, the port
    and torchrun's run id are the same in every start of the same command; the number of restarts differs between nodes;
    what one launcher alone knows (its process id) the launchers of other nodes do not. So the first process makes up
    the start's name and writes it to the store. The others may still read the name of an earlier start there. So they
    write names of their own under it. When the first process lists a process's name, that process has found the right
    start.

    A process of an earlier start that still ran could be listed in place of the right one. ``distributed.parent``
    prevents this: processes end with their launcher. Only the processes of a launcher that somebody left running on
    another node can get in.

    Raises:
        LocalError: the first process has not come in time.
    """
    name, end = uuid.uuid4().hex, time.monotonic() + timeout
    if launch.rank == 0:
        store.set("start", name)
        others = [store.get(f"{name}/{rank}").decode() for rank in range(1, launch.world_size)]
        store.set(f"{name}/all", " ".join(others))
        return dist.PrefixStore(name, store)
    while time.monotonic() < end:
        start = store.get("start").decode()
        store.set(f"{start}/{launch.rank}", name)
        if store.check([f"{start}/all"]) and name in store.get(f"{start}/all").decode().split():
            return dist.PrefixStore(start, store)
        time.sleep(0.05)
    raise LocalError(f"--timeout {timeout}: the first process has not come")


def main_only(action: Callable, *args) -> Any:
    """Call ``action(*args)`` in the main process; all return its result, or raise its InputError or RunError."""
    if not dist.is_initialized():
        return action(*args)
    answer = [None, None]  # the result and the error
    if is_main():
        try:
            answer[0] = action(*args)
        except (InputError, RunError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def main_first(action: Callable) -> Any:
    """Call ``action()`` in the main process, then in the others; all raise an InputError or RunError of the first."""
    result = []
    main_only(lambda: result.extend([action()]))
    return result[0] if result else action()
