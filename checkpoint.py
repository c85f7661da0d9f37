"""A run on disk: may it go on, restoring it, saving it."""

import json
from pathlib import Path

import utils
from engine import Trainer
from models.weights import first_mismatch
from utils import InputError, say

# What may change when a run goes on: where things lie, how they are computed, what is kept of them. The total batch
# must stay; how it is shared out may change with the machine.
# fmt: off
FREE_OPTIONS = (
    "config", "data_path", "eval_data_path", "num_workers", "pin_mem", "output_dir", "log_dir", "device", "eval",
    "disable_eval", "eval_interval", "dist_eval", "resume", "auto_resume", "overwrite", "save_ckpt",
    "save_ckpt_freq", "save_ckpt_num", "start_epoch", "enable_wandb", "project", "wandb_ckpt", "world_size",
    "local_rank", "dist_on_itp", "dist_url", "batch_size", "update_freq", "amp_dtype", "model_ema_force_cpu",
)
# fmt: on


WAYS_OUT = "choose another directory, or add --overwrite true to delete it"


def plain(args) -> dict:
    """All options as a dict of plain types, for checkpoints and JSON."""
    return json.loads(json.dumps(vars(args), sort_keys=True))


def open_output(args) -> Path | None:
    """Make sure that ``--output_dir`` can take this run; the checkpoint to go on from, or None to start.

    Raises:
        InputError: unwritable, or it holds another run, or one that cannot go on.
    """
    if args.output_dir is None:
        return Path(args.resume) if args.resume else None
    directory = Path(args.output_dir)
    utils.check_writable(directory, "--output_dir")
    held = [directory / name for name in ("args.json", "log.txt", "results.json") if (directory / name).exists()]
    held += sorted(directory.glob("checkpoint-*.pth"))
    utils.barrier()  # nobody writes before everybody has looked
    if args.resume:
        if held and Path(args.resume).resolve().parent != directory.resolve():
            raise InputError(f"--output_dir {directory}: holds another run than --resume {args.resume}; choose another")
        return Path(args.resume)
    if args.overwrite:
        for path in held if utils.is_main() else []:
            path.unlink()
        held = []
    elif held and not args.auto_resume:
        raise InputError(f"--output_dir {directory}: holds a run ({held[0].name}); {WAYS_OUT}")
    elif (directory / "args.json") in held:
        check_same_run(args, read_options(directory / "args.json"), "args.json")
    epochs = utils.checkpoint_epochs(directory) if held else []
    if not epochs and any(path.name != "args.json" for path in held) and not stopped_early(args, directory):
        raise InputError(f"--output_dir {directory}: holds a run without a checkpoint to go on from; {WAYS_OUT}")
    if utils.is_main():
        utils.write_json(directory / "args.json", plain(args))
    return utils.checkpoint_path(directory, epochs[-1]) if epochs else None


def stopped_early(args, directory: Path) -> bool:
    """Whether a run was stopped before its first numbered checkpoint was written, so that nothing is lost with it."""
    log = directory / "log.txt"
    logged = len(log.read_text().splitlines()) if log.exists() else 0
    return args.save_ckpt and logged <= args.save_ckpt_freq and not (directory / "results.json").exists()


def read_options(path: Path) -> dict:
    """The options of a run, from its ``args.json``."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"--output_dir {path.parent}: {path.name} is damaged ({error}); {WAYS_OUT}") from error


def check_same_run(args, other: dict, name: str) -> None:
    """Refuse to go on with a run that was started with other options."""
    mine = plain(args)
    for key in mine:
        if key not in FREE_OPTIONS and mine[key] != other.get(key):
            raise InputError(
                f"--output_dir {args.output_dir}: {name} is of a run with --{key} {other.get(key)}, not "
                f"{mine[key]}; {WAYS_OUT}"
            )


def resume(args, trainer: Trainer, path: Path) -> dict:
    """Restore a checkpoint into the trainer.

    Returns:
        The checkpoint's progress: epoch, seconds, and the best and last accuracies.

    Raises:
        InputError: unreadable, or of another model, or (when found in ``--output_dir``) of other options.
    """
    option = "--resume" if args.resume else "--output_dir"
    checkpoint = utils.load_torch(path, option)
    keys = checkpoint if isinstance(checkpoint, dict) else ()
    missing = [key for key in ("model", "optimizer", "epoch", "scaler", "args") if key not in keys]
    if missing:
        raise InputError(f"{option} {path}: not a checkpoint of main.py: it has no {missing[0]}")
    if not args.resume:
        check_same_run(args, checkpoint["args"], path.name)
    if checkpoint["epoch"] >= args.epochs and not args.eval:
        raise InputError(f"{option} {path}: written after epoch {checkpoint['epoch']}, beyond --epochs {args.epochs}")
    problem = first_mismatch(checkpoint["model"], trainer.model)
    if problem:
        raise InputError(f"{option} {path}: of another model ({checkpoint['args'].get('model')}): {problem}")
    trainer.model.load_state_dict(checkpoint["model"])
    if trainer.projector is not None:
        problem = first_mismatch(checkpoint.get("projector") or {}, trainer.projector)
        if problem:
            raise InputError(f"{option} {path}: of another distillation: projector: {problem}")
        trainer.projector.load_state_dict(checkpoint["projector"])
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(checkpoint["model_ema"] or checkpoint["model"])
    if not args.eval:
        try:
            trainer.optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{option} {path}: of another optimiser ({checkpoint['args'].get('opt')}): {error}"
            ) from error
        if trainer.scaler.is_enabled() and checkpoint["scaler"]:
            trainer.scaler.load_state_dict(checkpoint["scaler"])
    say(f"resumed {path}, written after epoch {checkpoint['epoch']}")
    return {
        key: checkpoint[key] for key in checkpoint if key in ("epoch", "seconds") or key.startswith(("best", "last"))
    }


def save(args, trainer: Trainer, name, progress: dict) -> None:
    """Write a checkpoint of plain types: readable with ``torch.load(weights_only=True)``."""
    if not utils.is_main():
        return
    checkpoint = {
        "model": trainer.model.state_dict(),
        "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
        "projector": trainer.projector.state_dict() if trainer.projector is not None else None,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "args": plain(args),
        **progress,
    }
    with utils.new_file(utils.checkpoint_path(args.output_dir, name)) as temporary:
        utils.save_torch(checkpoint, temporary)
