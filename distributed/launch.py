"""Where a process stands among those that train together. Imports no torch."""

from dataclasses import dataclass

from weight_selection.errors import InputError


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
