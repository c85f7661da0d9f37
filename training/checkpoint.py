"""The checkpoints of a run: their names, saving and restoring them."""

import copy
import json
import re
import reprlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

from distributed.process_group import main_only
from distributed.program import RunError
from engine import EpochSums, TrainState
from training.options import Options
from training.progress import RunProgress, refusal
from weight_selection import files
from weight_selection.errors import InputError
from weight_selection.sources import safe_load
from weight_selection.sources.directories import RUN as BEST
from weight_selection.sources.weight_files import first_mismatch, save_torch

VERSION = 2  # of the content. Version 1 has no key "version", and was never written within an epoch.
REQUIRED = ("model", "optimizer", "scaler", "args")  # the keys of its dicts
DEVICE_SETTINGS = ("fused", "foreach")  # settings of an optimiser that belong to the device, not to the run
NAME = re.compile(r"checkpoint-(\d+)(?:-step-(\d+))?\.pth")


def resume_point(path: Path) -> tuple[int, int] | None:
    """(epoch, step) at which training goes on from a checkpoint of this name; None for best and all other names.

    checkpoint-3.pth was written after epoch 3, counted from 0, and checkpoint-4-step-10.pth within epoch 4.
    """
    match = NAME.fullmatch(path.name)
    if match is None:
        return None
    return (int(match[1]) + 1, 0) if match[2] is None else (int(match[1]), int(match[2]))


def numbered(directory: Path) -> list[Path]:
    """The checkpoints in a directory from which a run can go on, oldest first."""
    paths = (path for path in Path(directory).glob("checkpoint-*.pth") if path.is_file())
    return sorted(filter(resume_point, paths), key=resume_point)


def find(path: str | Path, option: str, newest: bool = False) -> Path:
    """The checkpoint that a path means: a file itself, or one in the output directory of a run.

    Args:
        option: what named the path, for errors.
        newest: take the newest one, to go on from, and not the best one; each only if there is one.

    Raises:
        InputError: there is none; the message names the option.
    """
    path = Path(path)
    if not path.is_dir():
        files.check_file(path, option)
        return path
    best = [path / BEST] if (path / BEST).is_file() else []
    found = numbered(path)[-1:] + best if newest else best + numbered(path)[-1:]
    if not found:
        raise InputError(f"{option} {path}: holds no checkpoint of main.py; name the --output_dir of a run, or a file")
    return found[0]


def save(
    options: Options, state: TrainState, progress: RunProgress, description: dict, name: str | None = None
) -> Path:
    """Write a checkpoint of plain types: ``torch.load(weights_only=True)`` reads it. All processes must call it.

    Args:
        description: of the model, see ``trained_model.describe_model``.
        name: such as best; a checkpoint without one gets it from ``progress``.

    Returns:
        The path.

    Raises:
        RunError: it cannot be written; the earlier checkpoints are as they were.
    """
    default = progress.epoch
    if progress.partial is not None:
        default = f"{progress.epoch + 1}-step-{progress.partial.step}"
        progress = replace(progress, partial=replace(progress.partial, statistics=_gather_statistics(state)))
    path = Path(options.output_dir) / f"checkpoint-{default if name is None else name}.pth"
    main_only(_write, path, options, state, progress, description)
    return path


def _write(path, options, state, progress, description):
    content = {
        "version": VERSION,
        "model": state.model.state_dict(),
        "model_ema": state.ema.module.state_dict() if state.ema is not None else None,
        "projector": state.projector.state_dict() if state.projector is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "args": options.plain(),
        "description": description,
        **progress.to_checkpoint(),
    }
    try:
        with files.new_file(path) as temporary:
            save_torch(content, temporary)
    except InputError as error:
        raise RunError(f"{error}; the checkpoints before are whole: free some space and run it again") from error


def _gather_statistics(state):
    """The buffers of each process's moving average: within an epoch they come from its own images."""
    if state.ema is None or state.world_size == 1:
        return []
    module = state.ema.module
    parameters = {name for name, _ in module.named_parameters()}
    own = {key: value.cpu() for key, value in module.state_dict().items() if key not in parameters}
    return state.stop_coordinator.gather_objects(own)


def read(path: Path, origin: str) -> dict:
    """Read a checkpoint and check that it is one; ``restore`` checks whether its tensors and settings fit.

    Raises:
        InputError: unreadable, no checkpoint of main.py, or of a later version; begins with ``origin``.
    """
    content = safe_load.load_torch(path, origin.split()[0])
    if not isinstance(content, dict):
        raise refusal(origin, "not a checkpoint of main.py")
    for key in REQUIRED:
        if not isinstance(content.get(key), dict):
            raise refusal(origin, f"not a checkpoint of main.py: it has no {key}")
    version = content.get("version", 1)
    if not (type(version) is int and version <= VERSION):
        raise InputError(f"{origin}: of version {reprlib.repr(version)}, this program knows {VERSION}; update it")
    try:
        json.dumps(content["args"])
    except TypeError as error:
        raise refusal(origin, "not a checkpoint of main.py: its args are none") from error
    return content


def restore(options: Options, state: TrainState, content: dict, origin: str, train_images: int | None) -> RunProgress:
    """Put the tensors that ``read`` returned into the state; returns the progress beside them.

    In an evaluation the optimiser and the loss scaler stay as they are, and ``train_images`` is None.

    Raises:
        InputError: the checkpoint belongs to another model, optimiser, number of epochs or number of images, or was
            written within an epoch of another total batch or seed.
    """
    progress = RunProgress.from_checkpoint(content, origin)
    if not -1 <= progress.epoch < options.epochs and not options.eval:
        raise refusal(origin, f"written after epoch {progress.epoch}, not one of --epochs {options.epochs}")
    load_weights(state.model, content["model"], f"{origin}: of another model ({content['args'].get('model')})")
    if state.projector is not None:
        load_weights(state.projector, content.get("projector"), f"{origin}: of another distillation: projector")
    if state.ema is not None:
        average = content.get("model_ema")
        load_weights(state.ema.module, content["model"] if average is None else average, f"{origin}: moving average")
    if not options.eval:
        _load_optimizer(state.optimizer, content["optimizer"], f"{origin}: of another optimiser")
        if state.scaler.is_enabled() and content["scaler"]:
            _load_scaler(state.scaler, content["scaler"], origin)
    if progress.partial is not None:
        progress.partial = _restore_partial(options, state, progress, train_images, content["args"], origin)
    if state.ema is None:
        progress.last_ema = progress.best_ema = None  # of weights that do not train on
    progress.train_images = train_images
    return progress


def _restore_partial(options, state, progress, train_images, args, origin) -> EpochSums:
    """Check that this run can go on within the epoch, and load this process's statistics of the moving average."""
    partial = progress.partial
    if progress.train_images != train_images and not options.eval:
        raise InputError(
            f"{origin}: written within an epoch of {progress.train_images} images, now there are "
            f"{train_images}; restore them, or start anew"
        )
    for name in ("total_batch_size", "seed"):  # they decide which images are left
        ours = getattr(options, name)
        theirs = args.get(name, ours)
        if theirs != ours and not options.eval:
            raise refusal(origin, f"written within an epoch of --{name} {theirs}, not {ours}")
    if not 0 < partial.step <= state.steps_per_epoch and not options.eval:
        raise refusal(origin, f"written after {partial.step} of {state.steps_per_epoch} steps")
    if state.ema is not None and len(partial.statistics) == state.world_size:
        _load_own(state.ema.module, partial.statistics[state.rank], origin)
    return replace(partial, statistics=[])


def load_weights(module: nn.Module, state_dict: object, origin: str) -> None:
    """Put a checkpoint's tensors into a module; an InputError that begins with ``origin`` if they do not fit."""
    if not isinstance(state_dict, dict) or not all(map(safe_load.is_plain, state_dict.values())):
        raise refusal(origin, "no state_dict")
    problem = first_mismatch(state_dict, module)
    if problem:
        raise refusal(origin, problem)
    module.load_state_dict(state_dict)


def _load_own(module, statistics, origin):
    expected = module.state_dict()
    for key, value in statistics.items() if isinstance(statistics, dict) else [(None, None)]:
        if key not in expected or not safe_load.is_plain(value) or value.shape != expected[key].shape:
            raise refusal(origin, f"statistics {key} are not this model's")
    module.load_state_dict(statistics, strict=False)


def _load_optimizer(optimizer, state_dict, origin):
    """Load an optimiser's state, after comparing it with the optimiser's own: PyTorch itself would take any."""
    expected = optimizer.state_dict()["param_groups"]
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict) or len(groups) != len(expected):
        raise refusal(origin, "other groups of parameters")
    merged = []
    for ours, theirs in zip(expected, groups, strict=True):
        numbers = theirs.get("params") if isinstance(theirs, dict) else None
        if not _alike(numbers, ours["params"]) or numbers != ours["params"]:
            raise refusal(origin, "other parameters")
        for key, value in ours.items():
            if key not in DEVICE_SETTINGS and not _alike(theirs.get(key), value):
                raise refusal(origin, f"its {key} is {reprlib.repr(theirs.get(key))}")
        if not all(map(_is_state, (value for key, value in theirs.items() if key not in ours))):  # such as LAMB's step
            raise refusal(origin, "other settings")
        merged.append(theirs | {key: ours[key] for key in DEVICE_SETTINGS if key in ours})
    known = {number for ours in expected for number in ours["params"]}
    for number, values in state.items():
        if number not in known or not isinstance(values, dict) or not all(map(_is_state, values.values())):
            raise refusal(origin, "state of no parameter")
    state_dict = {**state_dict, "param_groups": merged}
    try:
        optimizer.load_state_dict(copy.deepcopy(state_dict))
        _try_step(optimizer)
        optimizer.load_state_dict(state_dict)
    except Exception as error:  # every optimiser has its own ways of failing on a state that is not its own
        raise refusal(origin, f"its state does not fit: {error!r}") from error


def _try_step(optimizer):
    """Take a step with gradients of zero, and put the parameters back; the caller replaces the optimiser's state."""
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
    """Whether a value can be part of an optimiser's state: a number, a tensor, or a list of these."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_state, value))
    return value is None or isinstance(value, (bool, int, float)) or safe_load.is_plain(value)


def _alike(value, ours):
    """Whether a setting has the type and length of our own."""
    if isinstance(ours, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(value) == len(ours) and all(map(_alike, value, ours))
    number = (int, float)
    return type(value) is type(ours) or (type(value) in number and type(ours) in number)


def _load_scaler(scaler, state_dict, origin):
    expected = scaler.state_dict()
    if state_dict.keys() != expected.keys() or not all(_alike(state_dict[key], expected[key]) for key in expected):
        raise refusal(origin, "other loss scaling")
    scaler.load_state_dict(state_dict)
