"""A run on disk: who may write there, may it go on, restoring it, saving it."""

import contextlib
import copy
import fcntl
import json
import os
import re
import reprlib
import socket
from pathlib import Path

import torch

from distributed.process_group import main_only
from distributed.program import RunError
from engine import TrainState
from training.metric_log import read_log
from training.options import MAY_CHANGE_ON_RESUME, default_options
from utils import print_main
from weight_selection import files
from weight_selection.errors import InputError, printable
from weight_selection.files import Damaged
from weight_selection.sources import safe_load
from weight_selection.sources.weight_files import first_mismatch, save_torch

VERSION = 2  # of what is in a checkpoint. 1, which did not say so, had no position within an epoch.
WAYS_OUT = "choose another directory, or add --overwrite true to delete it"
WAYS_TO_COMPUTE = ("fused", "foreach")  # settings of an optimiser that belong to the device, not to the run
NAME = re.compile(r"checkpoint-(\d+)(?:-step-(\d+))?\.pth")


def plain(args) -> dict:
    """All options as a dict of plain types, for checkpoints and JSON."""
    return args.plain()


# ---------------------------------------------------------------------------------------------------------
# Names. checkpoint-3.pth was written after epoch 3, counted from 0, and checkpoint-4-step-10.pth within epoch 4.


def position(path: Path) -> tuple | None:
    """(epoch, step) that training goes on from with a checkpoint of this name; None for best and all other names."""
    match = NAME.fullmatch(path.name)
    if match is None:
        return None
    return (int(match[1]) + 1, 0) if match[2] is None else (int(match[1]), int(match[2]))


def numbered(directory) -> list:
    """The checkpoints in a directory that a run can go on from, oldest first."""
    paths = (path for path in Path(directory).glob("checkpoint-*.pth") if path.is_file())
    return sorted(filter(position, paths), key=position)


def prune(directory, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints of both kinds; those within an epoch also once it is over."""
    paths = numbered(directory)
    ends = [path for path in paths if position(path)[1] == 0]
    within = [path for path in paths if position(path)[1] > 0]
    over = position(ends[-1]) if ends else (0, 0)
    for path in [*ends[:-keep], *within[:-keep], *(path for path in within[-keep:] if position(path) < over)]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot delete {path}: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------
# May it go on?


@contextlib.contextmanager
def open_output(args):
    """Keep ``--output_dir`` for this run, for as long as the block runs or the process lives.

    A lock of the process, not of its open file: loader workers, which may outlive it by seconds, do not hold it.

    Yields:
        The checkpoint to go on from, or None to start.

    Raises:
        InputError: it cannot be written to, another run is at work there, or it holds one that cannot go on.
    """
    if args.output_dir is None:
        yield Path(args.resume) if args.resume else None
        return
    directory = Path(args.output_dir)
    with contextlib.ExitStack() as stack:

        def lock_and_look():
            _lock(directory, stack)
            try:
                return _look_into(args, directory)
            except OSError as error:
                raise InputError(f"--output_dir {directory}: {error}; repair it, or choose another") from error

        yield main_only(lock_and_look)


def _lock(directory, stack):
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
    with contextlib.suppress(OSError):  # on a full disk: that it is locked matters more than by whom
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()


def _look_into(args, directory):
    """The checkpoint to go on from, or None; leaves ``args.json`` there."""
    for path in directory.glob(f"{files.PARTIAL}*"):
        if path.is_file():  # a run was killed while it wrote it
            path.unlink()
    held = [directory / name for name in ("args.json", "log.txt", "results.json") if (directory / name).exists()]
    held += sorted(directory.glob("checkpoint-*.pth")) + sorted(directory.glob("checkpoint-*.pth.damaged"))
    if args.resume and not _is_restart(args, directory):
        _check_resume(args, directory, held)
        files.write_json(directory / "args.json", plain(args))
        return Path(args.resume)
    if args.overwrite and not _restarted_by_its_launcher():
        for path in held:
            path.unlink()
        held = []
    elif held and not args.auto_resume:
        raise InputError(f"--output_dir {directory}: holds a run ({held[0].name}); {WAYS_OUT}")
    elif (directory / "args.json") in held:
        check_same_run(args, read_options(directory / "args.json"), "args.json")
    logged = len(read_log(directory / "log.txt")) if directory / "log.txt" in held else 0  # or: it is damaged
    found = newest_whole(directory) if held else None
    if not found and args.resume:
        return Path(args.resume)
    if not found and any(directory.glob("checkpoint-*.pth.damaged")):
        raise InputError(f"--output_dir {directory}: all its checkpoints are damaged; {WAYS_OUT}")
    if not found and any(path.name != "args.json" for path in held) and not stopped_early(args, directory, logged):
        raise InputError(f"--output_dir {directory}: holds a run without a checkpoint to go on from; {WAYS_OUT}")
    files.write_json(directory / "args.json", plain(args))
    return found


def _is_restart(args, directory):
    """Whether the same --resume was given before, so that what the directory holds comes from it."""
    options = directory / "args.json"
    return options.exists() and read_options(options).get("resume") == args.resume


def _restarted_by_its_launcher():
    """Then the run that --overwrite would delete is this one."""
    return any(int(os.environ.get(f"{launcher}_RESTART_COUNT", 0)) > 0 for launcher in ("TORCHELASTIC", "SLURM"))


def _check_resume(args, directory, held):
    """--resume into a directory that holds something: only of the same run, and from its newest checkpoint."""
    path = Path(args.resume)
    if held and path.resolve().parent != directory.resolve():
        raise InputError(f"--output_dir {directory}: holds another run than --resume {path}; choose another")
    newest = next(reversed(numbered(directory)), None) if held else None
    if newest is not None and newest.name != path.name:
        raise InputError(
            f"--resume {path}: --output_dir holds {newest.name}, which is newer and would be mixed up with what comes "
            "now; move it away, or choose another --output_dir"
        )


def newest_whole(directory: Path) -> Path | None:
    """The newest checkpoint of a run that is as it was written; damaged ones are set aside under another name."""
    for path in reversed(numbered(directory)):
        try:
            safe_load.check_archive(path)
            return path
        except Damaged as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.rename(aside)
            print_main(f"warning: {path} is damaged ({error}); set aside as {aside.name}; the one before is next")
    return None


def stopped_early(args, directory: Path, logged: int) -> bool:
    """Whether a run, with so many epochs in its log, was stopped before its first numbered checkpoint was written.

    Then nothing is lost with it.
    """
    return args.save_ckpt and logged <= args.save_ckpt_freq and not (directory / "results.json").exists()


def read_options(path: Path) -> dict:
    """The options of a run, from its ``args.json``."""
    try:
        options = files.parse_json(files.read_text(path))
        if not isinstance(options, dict):
            raise Damaged("no options")
        return options
    except Damaged as error:
        raise InputError(f"--output_dir {path.parent}: {path.name} is damaged ({error}); {WAYS_OUT}") from error


def check_same_run(args, other: dict, name: str) -> None:
    """Refuse to go on with a run that was started with other options; those it did not know had their defaults."""
    mine, defaults = plain(args), default_options().plain()
    for key in mine:
        theirs = other.get(key, defaults[key])
        if key not in MAY_CHANGE_ON_RESUME and mine[key] != theirs:
            theirs = theirs if isinstance(theirs, (str, int, float)) else reprlib.repr(theirs)
            raise InputError(
                f"--output_dir {args.output_dir}: {name} is of a run with --{key} {theirs}, not {mine[key]}; {WAYS_OUT}"
            )


# ---------------------------------------------------------------------------------------------------------
# Restoring


def resume(args, trainer: TrainState, path: Path, train_images: int | None) -> dict:
    """Restore a checkpoint into the trainer.

    Args:
        args: options.
        trainer: of the same model and optimiser.
        path: of the checkpoint.
        train_images: number of images to train on; None in evaluation.

    Returns:
        The checkpoint's progress, as ``save`` takes it.

    Raises:
        InputError: unreadable, or of another model, or (when found in ``--output_dir``) of other options.
    """
    named = args.resume is not None and path == Path(args.resume)
    origin = f"{'--resume' if named else '--output_dir'} {path}"
    content = _read(origin, path, args)
    if not named:
        check_same_run(args, content["args"], path.name)
    if not -1 <= content["epoch"] < args.epochs and not args.eval:
        raise InputError(f"{origin}: written after epoch {content['epoch']}, not one of --epochs {args.epochs}")
    _load(trainer.model, content["model"], f"{origin}: of another model ({content['args'].get('model')})")
    if trainer.projector is not None:
        _load(trainer.projector, content.get("projector"), f"{origin}: of another distillation: projector")
    if trainer.ema is not None:
        average = content.get("model_ema")
        _load(trainer.ema.module, content["model"] if average is None else average, f"{origin}: moving average")
    if not args.eval:
        _load_optimizer(trainer.optimizer, content["optimizer"], f"{origin}: of another optimiser")
        if trainer.scaler.is_enabled() and content["scaler"]:
            _load_scaler(trainer.scaler, content["scaler"], origin)
    progress = {key: content[key] for key in PROGRESS if key in content}
    if partial := progress.get("partial"):
        if progress.get("train_images") != train_images and not args.eval:
            raise InputError(
                f"{origin}: written within an epoch of {progress.get('train_images')} images, now there are "
                f"{train_images}; restore them, or start anew"
            )
        if not 0 < partial["step"] <= trainer.steps and not args.eval:
            raise InputError(f"{origin}: written after {partial['step']} of {trainer.steps} steps")
        statistics = partial.pop("statistics")
        if trainer.ema is not None and len(statistics) == trainer.world_size:
            _load_own(trainer.ema.module, statistics[trainer.rank], origin)
    where = f"step {partial['step']} of epoch {content['epoch'] + 1}" if partial else f"epoch {content['epoch']}"
    print_main(f"resumed {path}, written after {where}")
    return progress | {"train_images": train_images}


# What a checkpoint holds of a run's progress: the last epoch that is over; the figures of the next one so far, if it
# was written within one; seconds of training; training images, and those that could not be read; the accuracies.
FIGURES = {"epoch": int, "acc1": float, "acc5": float, "loss": float}
SUMS = {"step": int, "loss": float, "distance": float, "grad_norm": float, "skipped": int, "statistics": list}
PROGRESS = {
    "epoch": int,
    "partial": SUMS,
    "seconds": float,
    "train_images": int,
    "bad_images": [str],
    **dict.fromkeys(("best", "last", "best-ema", "last-ema"), FIGURES),
}
REQUIRED = {"model": dict, "optimizer": dict, "epoch": int, "scaler": dict, "args": dict, "seconds": (int, float)}


def _read(origin, path, args):
    content = safe_load.load_torch(path, origin.split()[0])
    if not isinstance(content, dict):
        raise InputError(f"{origin}: not a checkpoint of main.py")
    for key, kind in REQUIRED.items():
        if not isinstance(content.get(key), kind):
            raise InputError(f"{origin}: not a checkpoint of main.py: it has no {key}")
    if not (type(content.get("version", 1)) is int and content.get("version", 1) <= VERSION):
        raise InputError(
            f"{origin}: of version {reprlib.repr(content['version'])}, this program knows {VERSION}; update it"
        )
    try:
        json.dumps(content["args"])
    except TypeError as error:
        raise InputError(f"{origin}: not a checkpoint of main.py: its args are none") from error
    for key, kind in PROGRESS.items():
        if key in content and not (key == "partial" and content[key] is None) and not _fits(content[key], kind):
            raise InputError(f"{origin}: not a checkpoint of main.py: its {key} is none")
    return content


def _fits(value, kind):
    """Whether a value is of a kind: a type, [a type] for a list, or {key: type} for a dict."""
    if isinstance(kind, dict):
        return (
            isinstance(value, dict)
            and value.keys() == kind.keys()
            and all(_fits(value[key], kind[key]) for key in kind)
        )
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _load(module, state_dict, origin):
    if not isinstance(state_dict, dict) or not all(map(safe_load.is_plain, state_dict.values())):
        raise InputError(f"{origin}: no state_dict")
    problem = first_mismatch(state_dict, module)
    if problem:
        raise InputError(f"{origin}: {problem}")
    module.load_state_dict(state_dict)


def _load_own(module, statistics, origin):
    expected = module.state_dict()
    for key, value in statistics.items() if isinstance(statistics, dict) else [(None, None)]:
        if key not in expected or not safe_load.is_plain(value) or value.shape != expected[key].shape:
            raise InputError(f"{origin}: statistics {key} are not this model's")
    module.load_state_dict(statistics, strict=False)


def _load_optimizer(optimizer, state_dict, origin):
    """Load an optimiser's state after comparing it with the optimiser, which takes whatever it is given."""
    expected = optimizer.state_dict()["param_groups"]
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict) or len(groups) != len(expected):
        raise InputError(f"{origin}: other groups of parameters")
    for ours, theirs in zip(expected, groups, strict=True):
        numbers = theirs.get("params") if isinstance(theirs, dict) else None
        if not isinstance(numbers, list) or not _alike(numbers, ours["params"]) or numbers != ours["params"]:
            raise InputError(f"{origin}: other parameters")
        for key, value in ours.items():
            if key not in WAYS_TO_COMPUTE and not _alike(theirs.get(key), value):
                raise InputError(f"{origin}: its {key} is {reprlib.repr(theirs.get(key))}")
        if not all(map(_is_state, (value for key, value in theirs.items() if key not in ours))):  # such as LAMB's step
            raise InputError(f"{origin}: other settings")
    known = {number for ours in expected for number in ours["params"]}
    for number, values in state.items():
        if number not in known or not isinstance(values, dict) or not all(map(_is_state, values.values())):
            raise InputError(f"{origin}: state of no parameter")
    computed = [{key: ours[key] for key in WAYS_TO_COMPUTE if key in ours} for ours in expected]
    groups = [theirs | ways for theirs, ways in zip(groups, computed, strict=True)]
    state_dict = {**state_dict, "param_groups": groups}
    try:
        optimizer.load_state_dict(copy.deepcopy(state_dict))
        _rehearse(optimizer)
        optimizer.load_state_dict(state_dict)
    except Exception as error:  # every optimiser has its own ways of failing on a state that is not its own
        raise InputError(f"{origin}: its state does not fit: {error!r}") from error


def _rehearse(optimizer):
    """Take a step on no gradient and undo it; what it leaves in the optimiser's state is to be replaced."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def _is_state(value):
    """Whether a value may be an optimiser's: a number, a tensor, or a list of these."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_state, value))
    return value is None or isinstance(value, (bool, int, float)) or safe_load.is_plain(value)


def _alike(value, ours):
    """Whether a setting is of the type and length of our own."""
    if isinstance(ours, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(value) == len(ours) and all(map(_alike, value, ours))
    number = (int, float)
    return type(value) is type(ours) or (type(value) in number and type(ours) in number)


def _load_scaler(scaler, state_dict, origin):
    expected = scaler.state_dict()
    if state_dict.keys() != expected.keys() or not all(_alike(state_dict[key], expected[key]) for key in expected):
        raise InputError(f"{origin}: other loss scaling")
    scaler.load_state_dict(state_dict)


# ---------------------------------------------------------------------------------------------------------
# Saving


def save(args, trainer: TrainState, progress: dict, name: str | None = None) -> Path:
    """Write a checkpoint of plain types: readable with ``torch.load(weights_only=True)``. All processes must call it.

    Args:
        args: options.
        trainer: whose state is saved.
        progress: see ``PROGRESS``.
        name: such as ``"best"``; default: where training goes on from.

    Returns:
        Its path.

    Raises:
        RunError: it cannot be written; the checkpoints before are as they were.
    """
    partial = progress.get("partial")
    if partial is not None:
        progress = progress | {"partial": partial | {"statistics": _gather_statistics(trainer)}}
    default = f"{progress['epoch'] + 1}-step-{partial['step']}" if partial else progress["epoch"]
    path = Path(args.output_dir) / f"checkpoint-{default if name is None else name}.pth"

    def write():
        content = {
            "version": VERSION,
            "model": trainer.model.state_dict(),
            "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
            "projector": trainer.projector.state_dict() if trainer.projector is not None else None,
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "args": plain(args),
            **progress,
        }
        try:
            with files.new_file(path) as temporary:
                save_torch(content, temporary)
        except InputError as error:
            raise RunError(f"{error}; the checkpoints before are whole: free some space and run it again") from error

    main_only(write)
    return path


def _gather_statistics(trainer):
    """Of each process, the buffers of its moving average: within an epoch they are of its own images."""
    if trainer.ema is None or trainer.world_size == 1:
        return []
    module = trainer.ema.module
    parameters = {name for name, _ in module.named_parameters()}
    own = {key: value.cpu() for key, value in module.state_dict().items() if key not in parameters}
    return trainer.consensus.gather_objects(own)
