"""main.py with models of directories, and its output directory as a teacher's."""

import json

import pytest
import timm
import torch

import main
from helpers import assert_same, read, read_checkpoint, read_results
from models.distillation import build_teacher
from training.options import parse_args
from weight_selection import select_weights
from weight_selection.cli import main as select_main
from weight_selection.errors import InputError
from weight_selection.sources.timm_models import create_model

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small ViT, and the directory that timm saved it in."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("saved")
    model = create_model("vit_tiny", num_classes=3, **SIZES)
    timm.models.save_for_hf(model, directory, model_args=SIZES)
    return model, directory


@pytest.fixture(scope="module")
def run(saved, train, tmp_path_factory):
    """The output directory of a run of the saved architecture."""
    directory = tmp_path_factory.mktemp("run")
    named = f"--model local-dir:{saved[1]} --model_kwargs depth=3 --epochs 1 --output_dir {directory}"
    train(named)
    return directory


def test_a_run_trains_the_architecture_of_a_directory_from_its_own_initialisation(run, saved):
    assert read_results(run)["model"] == f"local-dir:{saved[1]}"
    trained = read_checkpoint(run, "best")["model"]
    expected = create_model("vit_tiny", num_classes=3, **SIZES | {"depth": 3}).state_dict()
    assert {key: value.shape for key, value in trained.items()} == {key: v.shape for key, v in expected.items()}
    assert not torch.equal(trained["pos_embed"], saved[0].pos_embed)


def test_the_output_directory_of_a_run_names_its_model_itself(run, tmp_path, cli):
    small = ["--student_kwargs", "embed_dim=16", "num_heads=1", "depth=2"]
    assert cli(select_main, "--pretrained_path", run, *small, "--output_dir", tmp_path / "x.pth") is None
    teacher = create_model("vit_tiny", num_classes=3, **SIZES | {"depth": 3})
    teacher.load_state_dict(read_checkpoint(run, "best")["model"])
    student = create_model("vit_tiny", num_classes=3, **SIZES | {"embed_dim": 16, "num_heads": 1})
    assert_same(read(tmp_path / "x.pth"), select_weights(teacher, student))
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["teacher"]["kwargs"] == {"num_classes": 3, "depth": 3}
    assert record["student"]["input_size"] == 16
    assert_same(select_weights(None, student, weights=run), select_weights(teacher, student))


def test_a_file_that_names_no_model_is_refused(tmp_path, cli):
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pth")
    message = cli(select_main, "--pretrained_path", tmp_path / "x.pth", "--student", "vit_tiny", "--dry_run")
    remedy = "does not say what model its weights are of; name the teacher too"
    assert message == f"--pretrained_path {tmp_path}/x.pth: {remedy}"


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_a_teacher_of_a_directory_has_its_weights(kind, saved):
    options = f"--input_size 16 --teacher local-dir:{saved[1]} --distillation {kind}".split()
    teacher = build_teacher(parse_args(options), 3)
    own = saved[0].state_dict()
    expected = own if kind == "logit" else {key: v for key, v in own.items() if not key.startswith("head.")}
    assert_same(dict(teacher.model.state_dict()), dict(expected))


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--model local-dir:nowhere", "no such directory"),
        ("--model transformers:x", "no such scheme as transformers:; "),
        ("--distillation feature --teacher local-dir:nowhere", "no such directory"),
        ("--model hf-hub:org/nowhere", "cannot fetch its configuration, config.json of the hub's org/nowhere"),
        ("--distillation feature --teacher hf-hub:org/nowhere", "config.json of the hub's org/nowhere"),
    ],
)
def test_names_that_cannot_be_used_are_refused_before_training(option, named, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as refused:
        main.main([*tiny_run, *option.split()])
    *_, name, value = option.split()
    assert str(refused.value).startswith(f"{name} {value}: ")
    assert named in str(refused.value)
