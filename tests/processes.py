"""Processes that train together, started in milliseconds: forks of this one, which has imported everything."""

import multiprocessing
import os
import resource
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import main
from distributed.program import run_program

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "GROUP_", "TORCHELASTIC_")
FORK = multiprocessing.get_context("fork")


def environment(**more):
    """This process's, without what a launcher above the tests may have left."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    return kept | {"OMP_NUM_THREADS": "1"} | more


@dataclass
class Together:
    """Processes of one run of main.py, and the files that they print to."""

    processes: list
    directory: Path

    def wait(self, timeout=120) -> list:
        """Exit statuses."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]

    def printed(self, rank, stream="out") -> str:
        return (self.directory / f"{stream}-{rank}.txt").read_text()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def workers(self) -> list:
        """Ids of the processes that a launcher, the only process here, has started."""
        pid = self.processes[0].pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_together(number, words, directory, largest_file=None) -> Together:
    """Start main.py with these options in several processes, working in a directory.

    Beyond ``largest_file`` bytes the operating system refuses to write on, as on a full disk.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(number))
    environs = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return start(run_main, environs, directory, words, largest_file)


def start_launcher(number, words, directory, restarts=100) -> Together:
    """Start torchrun's agent, which forks ``number`` processes of main.py and restarts them when one fails."""
    return start(_launcher, [environment()], directory, words, number, restarts)


def start(target, environs, directory, *args) -> Together:
    """Start ``target(*args)`` in one process for each environment, working in a directory."""
    processes = [
        FORK.Process(target=_enter, args=(target, str(directory), rank, environ, *args))
        for rank, environ in enumerate(environs)
    ]
    for process in processes:
        process.start()
    return Together(processes, Path(directory))


def _enter(target, directory, rank, environ, *args):
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environ)
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # and not pytest's
    multiprocessing.current_process()._config["daemon"] = False  # it has children of its own: loader workers
    torch.set_num_threads(1)
    target(*args)


def run_main(words, largest_file=None):
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    run_program("main.py", lambda: main.main(words))


def _launcher(words, number, restarts):
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _worker)(words)


def _worker(words):
    multiprocessing.current_process()._config["daemon"] = False
    try:
        run_main(words)
    except SystemExit as ended:
        if ended.code:
            raise  # and else return, which the launcher waits for
