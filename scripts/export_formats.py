"""The formats of export.py: each is written, opened again, and compared with the model before it is left."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch.utils.data import Dataset

import model_card
from datasets import DATA_SETS, UNREADABLE, ImageFiles, build_dataset, to_pixels
from input_pipeline.loader import EvalDataset
from input_pipeline.placement import build_pipeline
from models.initialization import fold_linear_probe
from training.trained_model import TrainedModel
from weight_selection.errors import InputError, first_line, printable
from weight_selection.files import check_writable, new_directory, new_file
from weight_selection.output import first_difference
from weight_selection.sources import timm_hub
from weight_selection.sources.timm_models import create_model
from weight_selection.sources.weight_files import write_weights

IMAGES = 32  # on which outputs are compared
TOLERANCE = 1e-4  # between logits; relative to the largest, if that is above 1
ONNX_LIMIT = 2**31  # bytes of a file of ONNX

# Of timm's configuration of a model: how a test image becomes an input, and what is true of published weights only.
PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
OF_PUBLISHED_WEIGHTS = ("license", "origin_url", "paper_ids", "paper_name", "notes", "label_offset", "test_crop_pct")


class Comparison:
    """Compares the outputs of what was written with a model's own.

    Args:
        files: of images; without any, test images of the run, and if they are not there, noise.

    Raises:
        InputError: an image cannot be read, or the model's own outputs are not finite.
    """

    def __init__(self, trained: TrainedModel, files: list[Path]):
        if files:
            data_set = ImageFiles([(file, 0) for file in files], to_pixels)
            self.images, self.of = transformed(trained, data_set), "images"
        else:
            self.images, self.of = own_images(trained)
        with torch.no_grad():
            self.logits = trained.model(self.images)
        if not self.logits.isfinite().all():
            raise InputError(f"RUN {trained.path}: its outputs are not finite; export another checkpoint")

    def check(self, name: str, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Compare, and print by how much the outputs differ.

        Args:
            name: of what runs the model, for the line.
            run: gives the logits (images, classes) of images (images, 3, size, size) for any number of them.

        Raises:
            InputError: they differ.
        """
        with torch.no_grad():
            theirs = torch.cat([run(part) for part in (self.images[:1], self.images[1:]) if len(part)])
        difference = (theirs - self.logits).abs().max().item()
        same = (theirs.argmax(1) == self.logits.argmax(1)).sum().item()
        found = f"logits of {name} differ from the model's by at most {difference:.1e}"
        found += f" on {len(self.images)} {self.of}, top-1 is the same for {same}"
        if not difference <= TOLERANCE * max(1, self.logits.abs().max().item()):
            raise InputError(f"--output: what was written is not this model: {found}")
        print(found)


def transformed(trained: TrainedModel, data_set: Dataset) -> torch.Tensor:
    """Inputs of the model, (images, 3, size, size), from images that are spread over a data set."""
    pipeline = build_pipeline(trained.options, train=False)
    items = EvalDataset(data_set, pipeline)
    numbers = torch.linspace(0, len(data_set) - 1, min(IMAGES, len(data_set))).round().int().tolist()
    batch = items.collate([items[number] for number in numbers])
    if batch.problems:
        raise InputError(f"--images: {batch.problems[0]}; name others")
    return pipeline.to_device(batch, torch.device("cpu"))


def own_images(trained: TrainedModel) -> tuple[torch.Tensor, str]:
    """Test images of the run's data set, if they are on this machine, or else noise; and what they are."""
    options = trained.options.replace(eval=True)
    data_set = DATA_SETS[options.data_set]
    try:
        if data_set.layout is None or data_set.folders:
            images = build_dataset(options, train=False)[0]
        else:  # build_dataset would download it
            images = data_set.build(options.data_path or "", False, to_pixels, False)
    except UNREADABLE as error:
        print(
            f"the test images of {options.data_set} are not here ({printable(error)[:200]}): compares on noise; "
            "--images names others"
        )
        size = (IMAGES, 3, options.input_size, options.input_size)
        return torch.randn(size, generator=torch.Generator().manual_seed(0)), "images of noise"
    return transformed(trained, images), f"test images of {options.data_set}"


def plain_model(trained: TrainedModel) -> tuple[nn.Module, dict]:
    """The model as timm knows it, and its description: a linear probe's normalisation is folded into its classifier."""
    if not trained.options.linear_probe:
        return trained.model, trained.description
    plain = replace(trained, options=trained.options.replace(linear_probe=False))
    return fold_linear_probe(trained.model), plain.description


def write_hub(trained: TrainedModel, path: Path, comparison: Comparison) -> None:
    """Write a directory that timm opens.

    Raises:
        InputError: timm cannot rebuild the model, the directory cannot be written, or its outputs differ.
    """
    model, description = plain_model(trained)
    state_dict, name = tensors_of(model), path.resolve().name
    config = dict.fromkeys(OF_PUBLISHED_WEIGHTS) | {key: description[key] for key in PREPROCESSING}
    built = description["model"], arguments(description), description["input_size"]
    configured = timm_hub.rebuildable(model, *built, config, "RUN", "take --format safetensors or onnx")
    usage = (
        f"import timm\n\nmodel = timm.create_model('local-dir:{name}', pretrained=True).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    )
    with new_directory(path, "--output", replace=True) as directory:
        timm_hub.write_config(configured, state_dict, directory, trained.class_names)
        write_weights(state_dict, directory / "model.safetensors", description=json.dumps(description))
        opened = timm_hub.reopened(model, directory).eval()
        if problem := first_difference(opened.state_dict(), state_dict):
            raise InputError(f"--format hub: what was written opens with other weights: {problem}")
        comparison.check("timm's model", opened)
        text = model_card.front_matter(trained, name) + model_card.card(trained, name, usage)
        (directory / "README.md").write_text(text, encoding="utf-8")


def write_safetensors(trained: TrainedModel, path: Path, comparison: Comparison) -> None:
    """Write the weights, with the model's description in the file's metadata.

    Raises:
        InputError: the file cannot be written, or its outputs differ.
    """
    model, description = plain_model(trained)
    name, kwargs = description["model"], {"input_size": description["input_size"], **arguments(description)}
    words = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    usage = (
        "from safetensors.torch import load_file\nfrom weight_selection.sources.timm_models import create_model\n\n"
        f"model = create_model({name!r}, {words}).eval()\nmodel.load_state_dict(load_file({path.name!r}))"
    )
    with with_card(path, model_card.card(trained, path.stem, usage)) as temporary:
        write_weights(tensors_of(model), temporary, description=json.dumps(description))
        opened = create_model(name, **kwargs).eval()
        opened.load_state_dict(load_file(temporary))
        comparison.check("the file's model", opened)


def write_onnx(trained: TrainedModel, path: Path, comparison: Comparison) -> None:
    """Write a graph of ONNX: float32 images (any number, 3, size, size) -> float32 logits (same number, classes).

    Raises:
        InputError: ONNX lacks an operation of the model, the file cannot be written, or its outputs differ.
    """
    model, description = plain_model(trained)
    program = onnx_program(model, description["model"], description["input_size"])
    program.model.metadata_props["description"] = json.dumps(description)
    usage = (
        f"import onnxruntime\n\nsession = onnxruntime.InferenceSession({path.name!r})\n"
        'logits = session.run(["logits"], {"images": images})[0]  # images: float32 '
        f"(any number, 3, {description['input_size']}, {description['input_size']})"
    )
    with with_card(path, model_card.card(trained, path.stem, usage)) as temporary:
        program.save(temporary, external_data=False)
        comparison.check("ONNX Runtime", partial(run_onnx, temporary))


WRITE = {"hub": write_hub, "safetensors": write_safetensors, "onnx": write_onnx}


def arguments(description: dict) -> dict:
    """The arguments, beside the input's size, from which the model of a description is built."""
    return {"num_classes": description["num_classes"], **description["model_kwargs"]}


def tensors_of(model: nn.Module) -> dict:
    """A model's state_dict without tensors that share memory (CoaT's do), which a safetensors file cannot hold."""
    return {key: value.clone() for key, value in model.state_dict().items()}


@contextlib.contextmanager
def with_card(path: Path, text: str) -> Iterator[Path]:
    """As ``files.new_file``; a model card is written beside the file."""
    check_writable(path.parent, "--output")
    with new_file(model_card.path_beside(path)) as beside, new_file(path) as temporary:
        yield temporary
        beside.write_text(text, encoding="utf-8")


def onnx_program(model: nn.Module, name: str, input_size: int) -> torch.onnx.ONNXProgram:
    """A model as a graph of ONNX, whose number of images is free.

    Raises:
        InputError: ONNX lacks an operation of the model, or the model is too large for one file.
    """
    remedy = "take --format hub or safetensors"
    size = sum(value.nbytes for value in model.state_dict().values())
    if size >= ONNX_LIMIT:
        raise InputError(f"--format onnx: {name} has {size / 1e9:.1f} GB, and a file of ONNX holds 2; {remedy}")
    images = torch.zeros(2, 3, input_size, input_size)  # torch.export would take a batch of one for a constant
    shapes = ({0: torch.export.Dim("batch")},)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    try:
        return torch.onnx.export(model, (images,), dynamo=True, verbose=False, dynamic_shapes=shapes, **names)
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"--format onnx: {_why_not(error, name)}; {remedy}") from error


def _why_not(error, name):
    """What the exporter met in a model that it cannot convert; its own message is a page."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = printable(first_line(error))
    if lacking := re.search(r"No ONNX function found for .*?op='([^']+)'", reason):
        return f"ONNX lacks {lacking[1]}, an operation of {name}"
    return f"torch cannot convert {name}: {reason[:300]}"


def run_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    """The logits that ONNX Runtime computes.

    Raises:
        InputError: it cannot run the file.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    except Exception as error:  # its errors have no class in common
        raise InputError(
            f"--format onnx: ONNX Runtime cannot run what was written: {printable(error)[:300]}"
        ) from error
