"""Where this process stands among the processes that train together. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from weight_selection.errors import InputError


@dataclass(frozen=True)
class Launch:
    """This process's number (rank), how many there are, and its number on this machine, as its launcher says."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def find_launch(environ: Mapping[str, str], mpi: bool = False) -> Launch:
    """Read the launch from the environment that torchrun, SLURM's srun or Open MPI's mpirun sets.

    Args:
        environ: such as ``os.environ``.
        mpi: trust Open MPI's variables (``--dist_on_itp``). A shell may have inherited them, so they do not count
            otherwise.

    Raises:
        InputError: ``mpi`` is set and the variables are missing.
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
    # srun sets the number of tasks of its step. The allocation's number (SLURM_NTASKS) does not count: a plain `python
    # main.py` in an allocation of 8 tasks is one process. It counts if somebody starts the tasks without srun, which
    # MASTER_ADDR tells.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS") if "MASTER_ADDR" in environ else None)
    if "SLURM_PROCID" in environ and tasks is not None and int(tasks) > 1:
        return Launch(int(environ["SLURM_PROCID"]), int(tasks), int(environ.get("SLURM_LOCALID", 0)))
    return Launch()
