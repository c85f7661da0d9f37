"""How far a run has come: everything that a checkpoint holds beside tensors and options."""

from dataclasses import dataclass, field, is_dataclass
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from engine import EpochSums
from weight_selection.errors import InputError

REQUIRED = ("epoch", "seconds")


def refusal(origin: str, why: str) -> InputError:
    """The error for a checkpoint that cannot be used. ``origin`` begins with the option that led to it."""
    remedy = "start anew in another directory" if origin.startswith("--output_dir ") else "name another checkpoint"
    return InputError(f"{origin}: {why}; {remedy}")


@dataclass(frozen=True)
class EvalMetrics:
    """The metrics of an evaluation: loss, accuracies in percent, and the epoch that it followed."""

    epoch: int
    acc1: float
    acc5: float
    loss: float


@dataclass
class RunProgress:
    """How far a run has come. The field names and types are the schema of the checkpoint's keys."""

    epoch: int  # the last epoch that is over, counted from 0; -1 before the first
    seconds: float = 0.0  # time spent in training
    train_images: int | None = None  # their number; None when it is not known
    last: EvalMetrics | None = None  # of the last evaluation
    best: EvalMetrics | None = None  # of the first evaluation with the highest accuracy
    last_ema: EvalMetrics | None = None  # the same of the moving average; the checkpoint's keys are last-ema, best-ema
    best_ema: EvalMetrics | None = None
    partial: EpochSums | None = None  # of the steps of the next epoch that are done; None between epochs
    classifier_init: dict | None = None  # how the first classifier was fitted: ``FittedClassifier.facts``
    bad_images: list[str] = field(default_factory=list)  # messages about the training images that could not be read

    @classmethod
    def from_checkpoint(cls, content: dict, origin: str) -> "RunProgress":
        """Read the progress from a checkpoint's keys, whose values nobody has checked yet.

        Raises:
            InputError: a required key is missing, or a value is not of its field's type; begins with ``origin``.
        """
        values = {}
        for name, kind in get_type_hints(cls).items():
            key = _key(name)
            if name in REQUIRED and not fits(content.get(key), kind):
                raise refusal(origin, f"not a checkpoint of main.py: it has no {key}")
            if key not in content or (key == "partial" and content[key] is None):
                continue
            kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind
            if not fits(content[key], kind):
                raise refusal(origin, f"not a checkpoint of main.py: its {key} is none")
            values[name] = _build(content[key], kind) if is_dataclass(kind) else content[key]
        return cls(**values)

    def to_checkpoint(self) -> dict:
        """The checkpoint's keys and their values, in plain types and tensors."""
        plain = {name: dict(vars(value)) if is_dataclass(value) else value for name, value in vars(self).items()}
        return {_key(name): value for name, value in plain.items() if value is not None or name == "partial"}

    def note_evaluation(self, metrics: dict, epoch: int) -> list[str]:
        """Take metrics, of which a moving average's end in ``_ema``; returns which of best and best-ema they beat."""
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


def _build(value, kind):
    """A dataclass from a dict that fits it; a field that is not there is None."""
    return kind(**{name: value.get(name) for name in get_type_hints(kind)})


def fits(value: object, kind: type | UnionType) -> bool:
    """Whether a value is of a field's type. An int may stand for a float; a dict must have a dataclass's fields.

    Fields that may be None may also be missing: older versions did not have them.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        complete = isinstance(value, dict) and value.keys() <= hints.keys()
        return complete and all(fits(value.get(name), hints[name]) for name in hints)
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, get_args(kind)[0]) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)
