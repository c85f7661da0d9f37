"""How far a run has come: everything that a checkpoint holds beside tensors and options."""

from dataclasses import dataclass, field, is_dataclass
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from engine import EpochSums
from weight_selection.errors import InputError

REQUIRED = ("epoch", "seconds")


@dataclass(frozen=True)
class EvalMetrics:
    """The metrics of an evaluation: loss, accuracies in percent, and the epoch that it followed."""

    epoch: int
    acc1: float
    acc5: float
    loss: float


@dataclass
class RunProgress:
    """How far a run has come. The field names and types are the schema of the checkpoint's keys.

    Attributes:
        epoch: the last epoch that is over, counted from 0; -1 before the first.
        seconds: time spent in training.
        train_images: number of training images; None when they are not known.
        last, best: metrics of the last evaluation, and of the first with the highest accuracy.
        last_ema, best_ema: the same of the moving average; its checkpoint keys are last-ema and best-ema.
        partial: sums over the steps of the next epoch that are done; None between epochs.
        bad_images: messages about the training images that could not be read.
    """

    epoch: int
    seconds: float = 0.0
    train_images: int | None = None
    last: EvalMetrics | None = None
    best: EvalMetrics | None = None
    last_ema: EvalMetrics | None = None
    best_ema: EvalMetrics | None = None
    partial: EpochSums | None = None
    bad_images: list[str] = field(default_factory=list)

    @classmethod
    def from_checkpoint(cls, content: dict, origin: str) -> "RunProgress":
        """Read the progress from a checkpoint's keys, whose values nobody has checked yet.

        Args:
            content: the checkpoint. Version 1 has no train_images, partial and bad_images.
            origin: option and file, for errors.

        Raises:
            InputError: a required key is missing, or a value is not of its field's type.
        """
        values = {}
        for name, kind in get_type_hints(cls).items():
            key = _key(name)
            if name in REQUIRED and not _fits(content.get(key), kind):
                raise InputError(f"{origin}: not a checkpoint of main.py: it has no {key}")
            if key not in content or (key == "partial" and content[key] is None):
                continue
            kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind
            if not _fits(content[key], kind):
                raise InputError(f"{origin}: not a checkpoint of main.py: its {key} is none")
            values[name] = kind(**content[key]) if is_dataclass(kind) else content[key]
        return cls(**values)

    def to_checkpoint(self) -> dict:
        """The checkpoint's keys and their values, in plain types and tensors."""
        plain = {name: dict(vars(value)) if is_dataclass(value) else value for name, value in vars(self).items()}
        return {_key(name): value for name, value in plain.items() if value is not None or name == "partial"}

    def note_evaluation(self, metrics: dict, epoch: int) -> list[str]:
        """Take the metrics of an evaluation; those of a moving average end in ``_ema``.

        Returns:
            the names of the checkpoints, best and best-ema, that it is better than.
        """
        better = []
        for suffix in ("", "_ema"):
            if f"acc1{suffix}" not in metrics:
                continue
            found = EvalMetrics(epoch, **{name: metrics[name + suffix] for name in ("acc1", "acc5", "loss")})
            best = getattr(self, f"best{suffix}")
            setattr(self, f"last{suffix}", found)
            if best is None or found.acc1 > best.acc1:
                setattr(self, f"best{suffix}", found)
                better.append(_key(f"best{suffix}"))
        return better

    def evaluations(self) -> dict[str, dict]:
        """{last, best, last_ema, best_ema: metrics} of the evaluations so far."""
        found = {name: getattr(self, name) for name in ("last", "best", "last_ema", "best_ema")}
        return {name: dict(vars(metrics)) for name, metrics in found.items() if metrics is not None}


def _key(name):
    return name.replace("_ema", "-ema")


def _fits(value, kind):
    """Whether a value is of a field's type. An int may stand for a float; a dict must have a dataclass's fields."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return (
            isinstance(value, dict)
            and value.keys() == hints.keys()
            and all(_fits(value[name], hints[name]) for name in hints)
        )
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)
