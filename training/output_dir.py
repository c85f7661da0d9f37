"""The output directory of a run: who may write there, whether the run it holds may go on, and from which checkpoint."""

import contextlib
import fcntl
import os
import reprlib
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

from distributed.process_group import main_only
from distributed.program import RunError
from training.checkpoint import numbered, resume_point
from training.metric_log import WANDB_RUN, read_log
from training.options import MAY_CHANGE_ON_RESUME, Options, default_options
from utils import print_main
from weight_selection import files
from weight_selection.errors import InputError, printable
from weight_selection.sources import safe_load
from weight_selection.sources.weight_files import training_options

HELD = ("args.json", "log.txt", "results.json", WANDB_RUN)  # the files of a run beside its checkpoints
WAYS_OUT = "choose another directory, or add --overwrite true to delete it"


@contextlib.contextmanager
def reserve(options: Options) -> Iterator[Path | None]:
    """Keep ``--output_dir`` for this run until the block ends or the process dies. An evaluation needs none.

    Yields the checkpoint to go on from (or to evaluate), or None to start. The lock belongs to the process, not to its
    open file, so that loader workers, which may live some seconds longer, do not hold it.

    Raises:
        InputError: the directory cannot be written to, another run is writing there, or it holds a run that cannot go
            on with these options.
    """
    if options.eval or options.output_dir is None:
        yield Path(options.resume) if options.resume else None
        return
    with contextlib.ExitStack() as stack:
        yield main_only(_lock_and_find_checkpoint, options, Path(options.output_dir), stack)


def _lock_and_find_checkpoint(options, directory, stack):
    before = set(directory.iterdir()) if directory.is_dir() else set()
    _lock(directory, stack)
    stack.push(lambda kind, error, trace: _forget(directory, before) if isinstance(error, InputError) else None)
    try:
        return _find_checkpoint(options, directory)
    except OSError as error:
        raise InputError(f"--output_dir {directory}: {error}; repair it, or choose another") from error


def _forget(directory, before):
    """Delete what a run that is refused has written: the corrected command is the first of its run."""
    new = set(directory.iterdir()) - before
    if {path.name for path in new} <= {".lock", "args.json"}:
        for path in new:
            path.unlink()


def _lock(directory, stack):
    """Lock the directory until the stack is closed."""
    files.check_writable(directory, "--output_dir")
    try:
        handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        file = stack.enter_context(open(handle, "r+", errors="replace"))
    except OSError as error:
        raise InputError(f"--output_dir {directory}: cannot open its .lock ({error.strerror})") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = printable(file.read(200)) or "its name is not known"
        raise InputError(
            f"--output_dir {directory}: another run is writing there ({holder}); wait for it, or choose another"
        ) from error
    except OSError as error:
        print_main(f"warning: --output_dir {directory}: cannot be locked ({error.strerror}); start no second run there")
    with contextlib.suppress(OSError):  # on a full disk the lock still counts, though it does not name its holder
        os.truncate(handle, 0)  # not ``file``, whose buffer would be written when it closes
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _find_checkpoint(options, directory):
    """The checkpoint to go on from, or None to start; writes ``args.json`` into the directory."""
    for path in directory.glob(f"{files.PARTIAL}*"):
        if path.is_file():  # a run was killed while it wrote this file
            path.unlink()
    held = [directory / name for name in HELD if (directory / name).exists()]
    held += sorted(directory.glob("checkpoint-*.pth")) + sorted(directory.glob("checkpoint-*.pth.damaged"))
    if options.resume and not _is_restart(options, directory):
        _check_resume(options, directory, held)
        files.write_json(directory / "args.json", options.plain())
        return Path(options.resume)
    if options.overwrite and not _restarted_by_its_launcher():
        for path in held:
            path.unlink()
        held = []
    elif held and not options.auto_resume:
        raise InputError(f"--output_dir {directory}: holds a run ({held[0].name}); {WAYS_OUT}")
    elif (directory / "args.json") in held:
        check_same_run(options, _read_options(directory / "args.json"), "args.json")
    logged = len(read_log(directory / "log.txt")) if directory / "log.txt" in held else 0  # or: it is damaged
    found = _newest_whole(directory) if held else None
    if not found and options.resume:
        return Path(options.resume)
    if not found and any(directory.glob("checkpoint-*.pth.damaged")):
        raise InputError(f"--output_dir {directory}: all its checkpoints are damaged; {WAYS_OUT}")
    if not found and any(path.name != "args.json" for path in held) and not _stopped_early(options, directory, logged):
        raise InputError(f"--output_dir {directory}: holds a run without a checkpoint to go on from; {WAYS_OUT}")
    files.write_json(directory / "args.json", options.plain())
    return found


def _is_restart(options, directory):
    """Whether the run in the directory was itself started with this --resume."""
    path = directory / "args.json"
    return path.exists() and _read_options(path).get("resume") == options.resume


def _restarted_by_its_launcher():
    """Whether a launcher restarted this run; then the run in the directory is this one, not one to overwrite."""
    return any(int(os.environ.get(f"{launcher}_RESTART_COUNT", 0)) > 0 for launcher in ("TORCHELASTIC", "SLURM"))


def _check_resume(options, directory, held):
    """Allow --resume into a directory that holds a run only from the newest checkpoint of that run."""
    path = Path(options.resume)
    if held and path.resolve().parent != directory.resolve():
        raise InputError(f"--output_dir {directory}: holds another run than --resume {path}; choose another")
    newest = next(reversed(numbered(directory)), None) if held else None
    if newest is not None and newest.name != path.name:
        raise InputError(
            f"--resume {path}: --output_dir holds {newest.name}, which is newer and would be mixed up with what comes "
            "now; move it away, or choose another --output_dir"
        )


def _newest_whole(directory):
    """The newest checkpoint of a run that is not damaged; damaged ones get another name."""
    for path in reversed(numbered(directory)):
        try:
            safe_load.check_archive(path)
            return path
        except files.Damaged as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.rename(aside)
            print_main(f"warning: {path} is damaged ({error}); set aside as {aside.name}; the one before is next")
    return None


def _stopped_early(options, directory, logged):
    """Whether a run was stopped before it had to write a numbered checkpoint; nothing is lost if it starts again."""
    return options.save_ckpt and logged <= options.save_ckpt_freq and not (directory / "results.json").exists()


def _read_options(path):
    """The options of a run, from its ``args.json``."""
    try:
        options = files.parse_json(files.read_text(path))
        if not isinstance(options, dict):
            raise files.Damaged("no options")
        return options
    except files.Damaged as error:
        raise InputError(f"--output_dir {path.parent}: {path.name} is damaged ({error}); {WAYS_OUT}") from error


def check_same_run(options: Options, other: dict, name: str) -> None:
    """Refuse to go on with a run that was started with ``other`` options, which are from the file ``name``.

    An option that the version of that run did not have counts with today's default.

    Raises:
        InputError: an option differs that may not change.
    """
    mine, defaults = options.plain(), default_options().plain()
    for key in mine:
        theirs = other.get(key, defaults[key])
        if key not in MAY_CHANGE_ON_RESUME and mine[key] != theirs:
            way_out = (_longer(options, theirs) if key == "epochs" else None) or WAYS_OUT
            theirs = theirs if isinstance(theirs, (str, int, float)) else reprlib.repr(theirs)
            raise InputError(
                f"--output_dir {options.output_dir}: {name} is of a run with --{key} {theirs}, not {mine[key]}; "
                f"{way_out}"
            )


def keep_warmup(options: Options) -> Options:
    """Options with the warm-up of the run that goes on: versions before 0.2 took 50 epochs if none was given.

    Raises:
        InputError: what records the options of that run is damaged.
    """
    recorded = main_only(_recorded_options, options).get("warmup_epochs")
    return options.replace(warmup_epochs=recorded) if type(recorded) is int else options


def _recorded_options(options):
    """The options of the run that goes on, from ``--output_dir`` or else from ``--resume``; {} for a new run."""
    path = Path(options.output_dir or "") / "args.json"
    if options.output_dir and path.exists() and (not options.overwrite or _restarted_by_its_launcher()):
        return _read_options(path)
    return training_options(options.resume, "--resume") if options.resume else {}


def _longer(options, epochs):
    """How to train for longer than the ``epochs`` of the run in the output directory; None if that is not asked for."""
    if type(epochs) is not int or epochs >= options.epochs:
        return None
    newest = next(reversed(numbered(options.output_dir)), None)
    if newest is None:
        return None
    other = options.output_dir.rstrip("/") + f"-{options.epochs}-epochs"
    words = shlex.join(["--resume", str(newest), "--output_dir", other])
    return f"a longer run has another schedule, and a directory of its own: end the same command with {words}"


def prune(directory: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints written after an epoch, and likewise of those written within one.

    A checkpoint from within an epoch goes as soon as one from after that epoch exists. What cannot be deleted raises a
    RunError.
    """
    paths = numbered(directory)
    ends = [path for path in paths if resume_point(path)[1] == 0]
    within = [path for path in paths if resume_point(path)[1] > 0]
    over = resume_point(ends[-1]) if ends else (0, 0)
    for path in [*ends[:-keep], *within[:-keep], *(path for path in within[-keep:] if resume_point(path) < over)]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot delete {path}: {error.strerror}") from error
