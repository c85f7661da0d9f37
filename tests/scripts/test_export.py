"""scripts/export.py: what it writes opens elsewhere with the model's own outputs, and says what it is."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors
import torch
import torch.nn as nn
import yaml
from PIL import Image

import export
import export_formats
import model_card
from engine import EpochSums
from helpers import read_checkpoint, written
from input_pipeline.placement import build_transform
from training.options import default_options
from training.setup import build_model
from training.trained_model import TrainedModel, open_trained
from weight_selection.errors import InputError

KWARGS = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4}


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """The output directory of a run with a moving average."""
    directory = tmp_path_factory.mktemp("exported") / "run"
    model = "--model_kwargs " + " ".join(f"{key}={value}" for key, value in KWARGS.items())
    average = "--model_ema true --model_ema_decay 0.5 --model_ema_eval true"
    train(f"{model} --crop_pct 0.9 {average} --output_dir {directory}")
    return directory


@pytest.fixture(scope="module")
def pictures(image_folder):
    """The test images, as PIL opens them."""
    return [Image.open(file) for file in sorted((image_folder / "val").rglob("*.png"))]


def inputs(trained, pictures):
    transform = build_transform(trained.options, train=False)
    return torch.stack([transform(picture) for picture in pictures])


def untrained(**options):
    """A model of images that are not here, as ``open_trained`` would open it."""
    options = default_options().replace(data_path="none", input_size=16, model_kwargs=KWARGS, **options)
    model = build_model(options, 10).eval()
    return TrainedModel(Path("none.pth"), options, options.plain(), False, list("0123456789"), model, 0, None)


def run_card(card, monkeypatch, **values):
    """What the Python of a model card defines, beside the exported file or directory."""
    with monkeypatch.context() as patch:
        patch.chdir(card.parent.parent if card.name == "README.md" else card.parent)
        exec(re.search(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)[1], values)
    return values


def test_timm_opens_a_directory_with_the_same_outputs(run, pictures, tmp_path, cli, capsys, monkeypatch):
    out = tmp_path / "new" / "model"
    assert cli(export.main, run, "--format", "hub", "--ema", "--output", out) is None
    assert written(out) == ["README.md", "config.json", "model.safetensors"]
    assert "on 13 test images of image_folder, top-1 is the same for 13" in capsys.readouterr().out
    trained = open_trained(run, "RUN", ema=True)
    opened = run_card(out / "README.md", monkeypatch)
    theirs = torch.stack([opened["transform"](picture.convert("RGB")) for picture in pictures])
    torch.testing.assert_close(theirs, inputs(trained, pictures))
    torch.testing.assert_close(opened["model"](theirs), trained.model(theirs), atol=1e-4, rtol=0)
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == trained.class_names == ["blue", "green", "red"]
    assert "license" not in config["pretrained_cfg"]
    _, front, text = (out / "README.md").read_text().split("---\n")
    accuracy = trained.metrics["acc1"]
    assert yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"][0]["value"] == round(accuracy, 4)
    assert f"Top-1 {accuracy:.2f} %" in text and "on 13 test images, after epoch" in text
    assert "the moving average, with a decay of 0.5" in text and "Random: `--init timm`" in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[1])
    assert recipe["model_kwargs"] == KWARGS and recipe["lr"] == 1e-3 and recipe["crop_pct"] == 0.9
    assert "data_path" not in recipe and "seed" not in recipe


def test_a_linear_probe_is_folded_into_one_layer(tmp_path):
    trained = untrained(linear_probe=True)
    norm = trained.model.head[0]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 10)
    folded, description = export_formats.plain_model(trained)
    assert isinstance(folded.head, nn.Linear) and isinstance(trained.model.head, nn.Sequential)
    assert description == trained.description | {"linear_probe": False}
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(folded(images), trained.model(images))
    export_formats.write_hub(trained, tmp_path / "probe", export_formats.Comparison(trained, []))


def test_a_safetensors_file_says_what_its_weights_are_of(run, tmp_path, cli, image_folder, capsys, monkeypatch):
    out, image = tmp_path / "model.safetensors", next((image_folder / "val" / "red").iterdir())
    words = [run, "--format", "safetensors", "--output", out, "--images", image]
    assert cli(export.main, *words) is None
    assert "on 1 images" in capsys.readouterr().out
    with safetensors.safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["description"]) == read_checkpoint(run, "best")["description"]
    opened = run_card(tmp_path / "model.safetensors.md", monkeypatch)["model"]
    torch.testing.assert_close(opened.state_dict(), read_checkpoint(run, "best")["model"], atol=0, rtol=0)
    before = out.read_bytes()
    assert cli(export.main, *words, "--ema") == f"--output {out}: {out.name} exists; add --overwrite to replace it"
    assert out.read_bytes() == before
    assert cli(export.main, *words, "--ema", "--overwrite") is None
    assert out.read_bytes() != before


def test_onnx_runtime_computes_the_same_for_any_number_of_images(run, pictures, tmp_path, cli, monkeypatch):
    assert cli(export.main, run, "--format", "onnx", "--output", tmp_path / "model.onnx") is None
    trained = open_trained(run, "RUN")
    images = inputs(trained, pictures)
    for part in (images, images[:1]):
        logits = run_card(tmp_path / "model.onnx.md", monkeypatch, images=part.numpy())["logits"]
        np.testing.assert_allclose(logits, trained.model(part).detach(), atol=1e-4, rtol=0)
    (metadata,) = onnx.load(tmp_path / "model.onnx").metadata_props
    assert json.loads(metadata.value) == trained.description


class Odd(nn.Module):
    def forward(self, images):
        return torch.linalg.svdvals(images)


def test_an_operation_that_onnx_lacks_is_named():
    with pytest.raises(InputError, match="^--format onnx: ONNX lacks aten._linalg_svd, an operation of odd; take"):
        export_formats.onnx_program(Odd().eval(), "odd", 8)


def test_what_differs_is_not_left(run, tmp_path, cli, monkeypatch):
    words = [run, "--format", "safetensors", "--output", tmp_path / "new" / "model.safetensors"]
    with monkeypatch.context() as patch:
        read = export_formats.load_file
        patch.setattr(export_formats, "load_file", lambda path: {key: 1.1 * value for key, value in read(path).items()})
        assert "what was written is not this model: logits of the file's model differ" in cli(export.main, *words)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    assert "No space left on device" in cli(export.main, *words)
    assert "No space left" in cli(export.main, run, "--format", "hub", "--output", tmp_path / "new" / "model")
    assert list(tmp_path.iterdir()) == []


def test_without_its_test_images_a_model_is_compared_on_noise(run, tmp_path, cli, capsys):
    content = read_checkpoint(run, "best")
    content["args"]["data_path"] = str(tmp_path / "gone")
    torch.save(content, tmp_path / "moved.pth")
    words = [tmp_path / "moved.pth", "--format", "safetensors", "--output", tmp_path / "model.safetensors"]
    assert cli(export.main, *words) is None
    printed = capsys.readouterr().out
    assert "the test images of image_folder are not here" in printed and "on 32 images of noise" in printed


def test_a_checkpoint_within_an_epoch_was_not_tested(run, tmp_path):
    content = read_checkpoint(run, "1")
    torch.save(content | {"partial": vars(EpochSums(step=1))}, tmp_path / "within.pth")
    assert open_trained(run / "checkpoint-1.pth", "RUN").metrics == content["last"]
    assert open_trained(tmp_path / "within.pth", "RUN").metrics is None


def test_first_weights_in_a_card():
    trained = untrained()
    trained = replace(trained, args=trained.args | {"initialize": "/home/me/init.pth"})
    assert "From the file `init.pth`, by `--initialize`" in (text := model_card.card(trained, "name", ""))
    assert 'initialize: "init.pth"' in text and "/home" not in text
    teacher = {"name": "vit_small", "model": "vit_small_patch16_224.augreg", "sha256": "ab12"}
    first = {"teacher": teacher, "options": {"element_selection": "uniform", "exclude": []}}
    text = model_card.describe_first_weights({}, {"first_weights": first})
    assert text == (
        "Selected from `vit_small_patch16_224.augreg` (SHA-256 of its file: ab12) with element_selection=uniform."
    )


def test_what_cannot_be_exported_is_refused(run, tmp_path, cli, monkeypatch):
    out = tmp_path / "new" / "out"
    assert "holds no checkpoint of main.py" in cli(export.main, tmp_path, "--format", "hub", "--output", out)
    for name, path in (("hub", "model.safetensors"), ("onnx", "model.pth"), ("safetensors", ".")):
        message = cli(export.main, run, "--format", name, "--output", tmp_path / path)
        assert message.startswith(f"--output {tmp_path / path}: ") or path == ".", message
    assert "cannot be read" in cli(export.main, run, "--format", "hub", "--output", out, "--images", __file__)
    trained = untrained(model="vit_tiny_clip")
    with pytest.raises(InputError, match="rebuild vit_tiny_clip .*JSON has no word for norm_layer=.*; take --format"):
        export_formats.write_hub(trained, out, export_formats.Comparison(trained, []))
    monkeypatch.setattr(export, "find_spec", lambda package: None)
    message = cli(export.main, run, "--format", "onnx", "--output", tmp_path / "model.onnx")
    assert 'onnx is not installed; run: pip install "weight-selection[onnx]"' in message
    assert list(tmp_path.iterdir()) == []
