"""A model that main.py trained, as its checkpoint describes it: what it is, and how an image is brought to it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn

from input_pipeline.placement import normalization, test_crop
from training import checkpoint
from training.options import OPTIONS, RECORDED, RECORDED_MODEL, Options, default_options
from training.progress import RunProgress, fits, refusal
from training.setup import build_model
from weight_selection.errors import InputError
from weight_selection.files import Damaged, parse_json, read_text
from weight_selection.sources.timm_names import model_of_checkpoint
from weight_selection.sources.weight_files import training_options

RESULTS = "results.json"


def describe_model(options: Options, class_names: list[str]) -> dict:
    """What a checkpoint says of its model, in plain types, for whoever opens the file.

    Returns:
        model, model_kwargs and num_classes, from which it is built; linear_probe; input_size, the side of the square
        input in pixels; mean and std by channel, crop_pct, crop_mode and interpolation, which bring a test image to it;
        data_set and class_names, in the order of the labels.
    """
    mean, std = normalization(options.imagenet_default_mean_and_std)
    return {
        "model": options.model,
        "model_kwargs": options.plain()["model_kwargs"],
        "num_classes": len(class_names),
        "linear_probe": options.linear_probe,
        "input_size": options.input_size,
        "mean": list(mean),
        "std": list(std),
        **test_crop(options),
        "data_set": options.data_set,
        "class_names": class_names,
    }


def find_recorded(options: Options) -> list:
    """What the checkpoints of main.py that options name as weights record: [({option: value}, path)].

    An evaluation takes all that says what the model is and what it was tested on. Training that starts from the weights
    takes what fits them; a teacher that is not named is the model of its checkpoint.

    Raises:
        InputError: a file cannot be read, a value is not of its option's type, or nothing says what the teacher is.
    """
    found = []
    names = ["resume"] * options.eval + ["initialize", "finetune"]  # in training --resume names the run itself
    if option := next((name for name in names if getattr(options, name)), None):
        wanted = RECORDED if options.eval else RECORDED_MODEL
        recorded, path = _read_recorded(option, getattr(options, option), wanted)
        if option == "resume" and not recorded:
            raise InputError(f"--resume {path}: not a checkpoint of main.py; name one, or the --output_dir of a run")
        found += [(recorded, path)] if recorded else []
    if options.teacher_path and options.teacher is None and not options.eval:
        recorded, path = _read_recorded("teacher_path", options.teacher_path, ("model", "model_kwargs"))
        if not recorded:
            raise InputError(f"--teacher_path {path}: does not say what model its weights are of; give --teacher too")
        found.append(({"teacher": recorded["model"], "teacher_kwargs": recorded["model_kwargs"]}, path))
    return found


def _read_recorded(option, path, wanted):
    """The options that a checkpoint records, none for weights from elsewhere; and the path of the file."""
    path = Path(path)
    if option == "resume" or (path / checkpoint.BEST).is_file():
        path = checkpoint.find(path, f"--{option}")
    if not path.is_file():  # a directory of weight_selection.py
        return {}, str(path)
    return _recorded(training_options(path, f"--{option}"), f"--{option} {path}", wanted), str(path)


def _recorded(args, origin, names):
    recorded = {name: args[name] for name in names if args.get(name) is not None}
    for name, value in recorded.items():
        option = OPTIONS[name]
        if not fits(value, option.type) or (option.choices and value not in option.choices):
            raise refusal(origin, f"not a checkpoint of main.py: its --{name} is {value!r:.80}")
    return recorded


def check_classes(content: dict, options: Options, class_names: list[str], origin: str) -> None:
    """Raise InputError if a checkpoint was trained on other classes of the same data set; begins with ``origin``."""
    theirs = _description(content, origin)
    if theirs.get("data_set") != options.data_set or theirs["class_names"] == class_names:
        return
    odd = sorted({*theirs["class_names"]} ^ {*class_names}) or class_names
    raise InputError(
        f"{origin}: of other classes than --data_path has, such as {odd[0]!r:.80}; name the images of its own"
    )


def _description(content, origin):
    """The description in a checkpoint; of an older one an empty dict."""
    description = content.get("description", {})
    names = description.get("class_names") if isinstance(description, dict) else None
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if description != {} and not named:
        raise refusal(origin, "not a checkpoint of main.py: its description is none")
    return description


@dataclass(frozen=True)
class TrainedModel:
    """A model that main.py trained.

    Attributes:
        path: of the checkpoint.
        options: those that say what the model is; the others have their defaults.
        args: all options that it was trained with.
        ema: its weights are the moving average.
        class_names: in the order of the labels; numbers in a checkpoint that does not name them.
        model: on the CPU, in evaluation mode.
        epoch: after which the checkpoint was written, counted from 0; -1 within the first.
        metrics: {loss, acc1, acc5} of the test after that epoch; None without one.
    """

    path: Path
    options: Options
    args: dict
    ema: bool
    class_names: list[str]
    model: nn.Module
    epoch: int
    metrics: dict | None

    @property
    def description(self) -> dict:
        """See ``describe_model``."""
        return describe_model(self.options, self.class_names)

    def results(self) -> dict | None:
        """The content of the results.json beside the checkpoint; None before the run has finished."""
        try:
            content = parse_json(read_text(self.path.parent / RESULTS))
        except Damaged:
            return None
        return content if isinstance(content, dict) else None


def open_trained(path: str | Path, option: str, ema: bool = False) -> TrainedModel:
    """Open the model in a checkpoint, or in the output directory of a run; of one that has not finished, say which.

    Args:
        option: what named the path, for errors.
        ema: take the moving average of its weights.

    Raises:
        InputError: there is no checkpoint, it cannot be read, or it has no moving average.
    """
    file = checkpoint.find(path, option)
    origin = f"{option} {file}"
    content = checkpoint.read(file, origin)
    progress = RunProgress.from_checkpoint(content, origin)
    weights = content.get("model_ema") if ema else content["model"]
    if not isinstance(weights, dict):
        raise InputError(f"{origin}: has no moving average of the weights; leave --ema out")
    options = default_options().replace(**_recorded(content["args"], origin, RECORDED))
    names = _description(content, origin).get("class_names")
    if names is None:
        names = [str(label) for label in range(model_of_checkpoint(file, option)[1]["num_classes"])]
    model = build_model(options, len(names))
    checkpoint.load_weights(model, weights, f"{origin}: not the weights of {options.model}")
    if Path(path).is_dir() and not (file.parent / RESULTS).is_file():
        print(f"{path}: has not finished; takes {file.name}, of epoch {progress.epoch}", file=sys.stderr)
    last = progress.last_ema if ema else progress.last
    is_of_these_weights = last is not None and last.epoch == progress.epoch and progress.partial is None
    metrics = dict(vars(last)) if is_of_these_weights else None
    return TrainedModel(file, options, content["args"], ema, names, model.eval(), progress.epoch, metrics)
