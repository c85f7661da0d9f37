"""A model card: what a trained model is, how well it does, how it came about, and how to open it. Imports no torch."""

import json
from pathlib import Path

from training.options import CANNOT_CHANGE_RESULT, OPTIONS, default_options
from training.trained_model import TrainedModel
from weight_selection.errors import printable

NAMED = 20  # class names that a card lists
# Metavars of options that name a file: of its path, only the name means anything to others.
ABOUT_FILES = ("FILE", "PATH")


def path_beside(path: Path) -> Path:
    """The model card of a file."""
    return path.with_name(f"{path.name}.md")


def card(trained: TrainedModel, name: str, usage: str) -> str:
    """The text of a model card in Markdown.

    Args:
        trained: a ``TrainedModel``.
        name: of what was exported.
        usage: lines of Python that open it.
    """
    sections = {
        "The model": describe_model(trained),
        "Accuracy": describe_accuracy(trained),
        "First weights": describe_first_weights(trained.args, trained.results() or {}),
        "Recipe": f"Options of main.py that differ from their defaults:\n\n```yaml\n{recipe(trained.args)}\n```",
        "Use": f"```python\n{usage}\n```\n\nImages: {describe_images(trained.description)}",
    }
    return f"# {printable(name)}\n\n" + "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())


def front_matter(trained: TrainedModel, name: str) -> str:
    """The card's metadata for the Hugging Face hub, in YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    data_set, results = trained.options.data_set, None
    if trained.metrics:
        data = {"dataset_type": data_set, "dataset_name": data_set, "dataset_split": "test"}
        accuracy = {
            "metric_type": "accuracy",
            "metric_name": "top-1 accuracy in percent",
            "metric_value": round(trained.metrics["acc1"], 4),
        }
        results = [EvalResult(task_type="image-classification", **data, **accuracy)]
    tags = ["image-classification", "timm"]
    data = ModelCardData(
        library_name="timm", pipeline_tag=tags[0], tags=tags, model_name=printable(name), eval_results=results
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def describe_model(trained: TrainedModel) -> str:
    """What the model is, and its classes."""
    options, names = trained.options, [printable(each) for each in trained.class_names]
    arguments = ", ".join(f"{key}={value}" for key, value in options.model_kwargs.items())
    values = sum(parameter.numel() for parameter in trained.model.parameters())
    listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    lines = [
        f"- model: `{options.model}`" + (f" with {arguments}" if arguments else ""),
        f"- parameters: {values:,}",
        f"- trained on: {options.data_set}",
        f"- {len(names)} classes: {listed}",
    ]
    if trained.ema:
        lines.append(f"- weights: the moving average, with a decay of {trained.args.get('model_ema_decay')}")
    return "\n".join(lines)


def describe_accuracy(trained: TrainedModel) -> str:
    """Accuracy on the test images, and after which epoch."""
    after = f"after epoch {trained.epoch} (counted from 0) of {trained.args.get('epochs')}"
    if not trained.metrics:
        return f"The weights are those {after}. They were not tested then."
    images = (trained.results() or {}).get("test_images")
    on = f"on {images:,} test images" if isinstance(images, int) else "on the test images"
    is_best = trained.path.name.startswith("checkpoint-best")
    best = " Of all epochs this one did best on these images." if is_best else ""
    acc1, acc5 = (trained.metrics[key] for key in ("acc1", "acc5"))
    return f"Top-1 {acc1:.2f} %, top-5 {acc5:.2f} % {on}, {after}.{best}"


def describe_first_weights(args: dict, results: dict) -> str:
    """The weights from which training started."""
    if first := results.get("first_weights"):
        teacher, rules = first["teacher"], first["options"]
        sha256 = teacher.get("sha256")
        said = f" (SHA-256 of its file: {sha256})" if isinstance(sha256, str) else ""
        words = ", ".join(f"{name}={value}" for name, value in rules.items() if value)
        return f"Selected from `{teacher.get('model') or teacher.get('name')}`{said} with {words}."
    for option in ("initialize", "finetune"):
        if path := args.get(option):
            sha256 = results.get(f"{option}_sha256")
            said = f" (SHA-256: {sha256})" if sha256 else ""
            return f"From the file `{printable(Path(path).name)}`{said}, by `--{option}`."
    return f"Random: `--init {args.get('init')}`."


def recipe(args: dict) -> str:
    """Options of a run that differ from their defaults and can change a result, a line of YAML for each."""
    defaults, lines = default_options().plain(), []
    for name, option in OPTIONS.items():
        value = args.get(name, defaults[name])
        if value == defaults[name] or name in CANNOT_CHANGE_RESULT or name == "resume":
            continue
        if option.metavar in ABOUT_FILES:
            value = Path(value).name
        lines.append(f"{name}: {json.dumps(value)}")
    return "\n".join(lines)


def describe_images(description: dict) -> str:
    """How an image becomes an input."""
    size, mean, std = (description[key] for key in ("input_size", "mean", "std"))
    crop = f"crop_pct {description['crop_pct']:g}, crop_mode {description['crop_mode']}, {description['interpolation']}"
    return f"RGB, {size} x {size} pixels ({crop}), values from 0 to 1, normalised with mean {mean} and std {std}."
