"""How well a student agrees with its teacher: by hand, and as the command prints it, on images that are held out."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

from architectures import lively, models
from helpers import assert_same, images_for, read, words
from weight_selection import InputError, measure_agreement, select_weights
from weight_selection.cli import main as select_main
from weight_selection.projection.images import Calibration, draw
from weight_selection.sources.timm_models import create_model

CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}
LARGE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 50}
SMALL = {**LARGE, "embed_dim": 8, "depth": 1}


class Scores(nn.Module):
    """Gives inputs as scores, with some classes exchanged, and bare or as Hugging Face's models do."""

    def __init__(self, *order, wrapped=False):
        super().__init__()
        self.order, self.wrapped, self.unused = list(order), wrapped, nn.Linear(1, 1)

    def forward(self, scores):
        assert not self.training
        return SimpleNamespace(logits=scores[:, self.order]) if self.wrapped else scores[:, self.order]


def test_agreement_is_the_percentage_of_images_of_one_class_in_both():
    classes = torch.tensor([0, 1, 2, 2, 1, 0, 0, 0])
    scores = torch.eye(3)[classes] + 0.1 * torch.rand(8, 3)
    teacher, student = Scores(0, 1, 2).train(), Scores(0, 2, 1, wrapped=True)
    assert measure_agreement(teacher, student, [scores[:5], scores[5:]]) == 50
    assert measure_agreement(teacher, student, [{"scores": scores[:5]}]) == 20
    assert measure_agreement(student, student, scores.float().repeat(5, 1)) == 100
    teacher.unused.eval()
    assert measure_agreement(teacher, teacher, scores) == 100
    assert teacher.training and not teacher.unused.training, "the caller's model is left as it is"
    with pytest.raises(InputError, match="the teacher has 3 classes, the student 2"):
        measure_agreement(teacher, Scores(0, 1), scores)
    with pytest.raises(InputError, match=r"a Scores gives \(8, 3, 1\), not a score"):
        measure_agreement(teacher, student, [scores[..., None]])
    for none in ([], scores[:0]):
        with pytest.raises(InputError, match="there are none"):
            measure_agreement(teacher, student, none)


def test_agreement_takes_batches_as_loaders_give_them():
    scores, labels = torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 0])
    teacher, student = Scores(0, 1, 2), Scores(0, 2, 1)
    assert measure_agreement(teacher, student, DataLoader(TensorDataset(scores, labels), 2)) == 25
    assert measure_agreement(teacher, student, [{"scores": scores, "labels": labels, "text": ["a"] * 4}]) == 25
    with pytest.raises(InputError, match="images: batches must be tensors, .* not str"):
        measure_agreement(teacher, student, ["scores"])


def test_agreement_is_not_measured_in_the_precision_of_the_callers_autocast():
    scores, layer = torch.tensor([[1.0, 1.001], [0.5, 0.2]]), nn.Linear(2, 2)
    nn.init.eye_(layer.weight), nn.init.zeros_(layer.bias)
    with torch.autocast("cpu", torch.bfloat16):  # in which the first two scores are equal
        assert measure_agreement(Scores(0, 1), layer, scores) == 100
    assert measure_agreement(Scores(0, 1).bfloat16(), layer.bfloat16(), scores) == 100, "images get the model's type"


def test_held_out_images_are_others_and_the_calibrations_stay_the_same(image_folder):
    drawn, others = draw(1000, 256, 3), draw(1000, 64, 3, 256)
    assert len({*drawn, *others}) == 320 and draw(1000, 64, 4, 256) != others
    calibration = Calibration(image_folder, 40, None, (3, 16, 16), CONFIG, 0)
    held_out = calibration.held_out()
    images, rest = torch.cat(list(calibration)), torch.cat(list(held_out))
    assert (held_out.count, len(rest), len(images)) == (21, 21, 40)
    assert len(torch.cat([images, rest]).flatten(1).unique(dim=0)) == 61, "an image twice"


@pytest.fixture(scope="module")
def command(tmp_path_factory, image_folder):
    """Words of the command line: a small teacher's file and a smaller student; later words win."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    teacher = lively(create_model("vit_small", **LARGE)).float()
    with torch.no_grad():
        scores = torch.cat([teacher(batch) for batch in Calibration(image_folder, 40, None, (3, 16, 16), CONFIG, 0)])
        teacher.head.bias -= scores.mean(0)  # so that it does not choose one class for all images
    torch.save(teacher.state_dict(), path)
    given = ["--pretrained_model", "vit_small", "--pretrained_path", path, "--student", "vit_tiny"]
    given += ["--teacher_kwargs", *words(LARGE), "--student_kwargs", *words(SMALL), "--calibration", image_folder]
    return [*given, "--calibration_images", 40, "--output_dir"]


def said(capsys):
    """The line about agreement that the command printed."""
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "agrees" in line)
    return line


def test_a_student_as_large_as_its_teacher_agrees_on_all_images(cli, command, tmp_path, capsys):
    line = "the student agrees with its teacher on 100 % of 21 held-out images"
    whole = ["--student_kwargs", *words(LARGE), "--element_selection"]
    assert cli(select_main, *command, tmp_path / "init.pth", *whole, "project") is None
    assert said(capsys) == f"with the teacher's classifier, {line}"
    assert cli(select_main, *command, tmp_path / "all.pth", *whole, "greedy", "--include_head") is None
    assert said(capsys) == line


def test_the_command_measures_the_student_that_it_would_write_with_its_classifier(
    cli, command, image_folder, tmp_path, capsys
):
    assert cli(select_main, *command, tmp_path / "init.pth", "--element_selection", "project") is None
    with_classifier = ["--element_selection", "project", "--include_head"]
    assert cli(select_main, *command, tmp_path / "all.pth", *with_classifier) is None
    first, whole = (json.loads((tmp_path / f"{name}.json").read_text())["agreement"] for name in ("init", "all"))
    teacher, student = create_model("vit_small", **LARGE), create_model("vit_tiny", **SMALL)
    teacher.load_state_dict(read(command[3]))
    student.load_state_dict(read(tmp_path / "all.pth"))
    others = Calibration(image_folder, 40, None, (3, 16, 16), CONFIG, 0).held_out()
    with torch.no_grad():
        same = [teacher.eval()(batch).argmax(1) == student.eval()(batch).argmax(1) for batch in others]
    expected = 100 * torch.cat(same).double().mean().item()
    assert first == whole == {"percent": expected, "held_out_images": 21} and 20 < expected < 100


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--calibration", "noise"], "--calibration noise: only a directory has images to hold out"),
        (["--calibration_images", 61], "all 61 images of --calibration were calibrated on; put more there, or give a "),
        (
            ["--student_kwargs", *words({**SMALL, "num_classes": 3})],
            "teacher has 50 classes, student 3 (head.weight); ",
        ),
        (["--pretrained_path", "headless"], "the teacher's weights have no classifier"),
    ],
)
def test_where_it_cannot_be_known_the_command_says_why(cli, command, more, reason, tmp_path, capsys):
    if "headless" in more:
        weights = {key: value for key, value in read(command[3]).items() if not key.startswith("head")}
        torch.save(weights, tmp_path / "teacher.pth")
        more = ["--pretrained_path", tmp_path / "teacher.pth"]
    assert cli(select_main, *command, tmp_path / "init.pth", "--element_selection", "greedy", *more) is None
    assert said(capsys).startswith(f"how well the student agrees with its teacher is not known: {reason}")
    assert "agreement" not in json.loads((tmp_path / "init.json").read_text())


@pytest.mark.parametrize(("name", "method"), [("vit", "project"), ("convnext", "greedy")])
def test_what_is_written_does_not_depend_on_the_classifier_that_is_fitted_to_measure(name, method):
    """A student of other classes has no classifier to be fitted."""
    teacher, student = models(name)
    images = images_for(teacher, 3, 32).float()
    fit = {"element_selection": method, "calibration": images}
    student_of_more = models(name)[1]
    student_of_more.reset_classifier(student.num_classes + 1)
    assert_same(select_weights(teacher, student, **fit), select_weights(teacher, student_of_more, **fit))
