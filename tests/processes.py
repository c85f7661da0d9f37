"""Processes that train together, started in milliseconds: a server that has imported everything forks them."""

import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import main
from distributed.program import run_program

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "GROUP_", "TORCHELASTIC_")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["training.run"])


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


def start_together(number, words, directory, **environ) -> Together:
    """Start main.py with these options in several processes, working in a directory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(number)) | environ
    own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    processes = [SERVER.Process(target=_run, args=(words, rank, str(directory), own[rank])) for rank in range(number)]
    for process in processes:
        process.start()
    return Together(processes, Path(directory))


def _run(words, rank, directory, environ):
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environ)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        handle = os.open(f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, stream.fileno())
    multiprocessing.current_process()._config["daemon"] = False  # it has children of its own: loader workers
    torch.set_num_threads(1)
    run_program("main.py", lambda: main.main(words))
