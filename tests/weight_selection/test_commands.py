"""After selecting: the command that comes next, files for another model, and heads that are cut across."""

import json
import shlex
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import assert_same, meta
from pairs import PAIRS, VIT
from training.options import parse_args
from training.setup import build_model, complete_options
from weight_selection.cli import main as select_main
from weight_selection.cli import print_next
from weight_selection.errors import InputError
from weight_selection.plan import make_plan
from weight_selection.report import head_warnings
from weight_selection.sources.teachers import normalization

HALVES = ["--imagenet_default_mean_and_std", "false"]


def words_of(text, program):
    """The words of the command at the end of a text."""
    python, script, *words = shlex.split(text[text.rindex("python ") :])
    assert (python, script) == ("python", program)
    return words


def trained_model(words):
    """The model that main.py would train first, with five classes."""
    words = map(str, words)
    return build_model(complete_options(parse_args([*words, "--device", "cpu"]), 0), 5)


@pytest.mark.parametrize(("architecture", "form"), [("vit", "file"), ("vit", "hub"), ("convnext", "file")])
def test_the_next_command_trains_from_what_was_written(architecture, form, cli, files, selected, tmp_path, capsys):
    more = ["--format", "hub"] if form == "hub" else []
    assert cli(select_main, *PAIRS[architecture].command(tmp_path / "init", files[architecture], *more)) is None
    words = words_of(capsys.readouterr().out, "main.py")
    assert words[:2] == ["--model", PAIRS[architecture].student]
    model = trained_model(words).state_dict()
    assert_same({key: model[key] for key in selected[architecture]}, selected[architecture])


def test_a_student_of_a_recipe_is_trained_by_it(cli, files, tmp_path, capsys):
    sizes = "{embed_dim: 24, depth: 2, num_heads: 3}"
    (tmp_path / "student.yaml").write_text(f"model: vit_tiny\ninput_size: 32\nmodel_kwargs: {sizes}\n")
    command = VIT.command(tmp_path / "init.pth", files["vit"], "--student_config", tmp_path / "student.yaml")
    start = command.index("--student")
    del command[start : command.index("--output_dir")]
    assert cli(select_main, *command) is None
    config = str(tmp_path / "student.yaml")
    words = ["--config", config, *HALVES, "--initialize", str(tmp_path / "init.pth")]  # as timm's ViT-S was trained
    assert words_of(capsys.readouterr().out, "main.py") == words


CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
NORMALISED = {  # the teacher's images: what a checkpoint of main.py says, if it is one; the option that gives them
    "timm's": (None, HALVES),
    "main.py's, by halves": (False, HALVES),
    "main.py's, by ImageNet's": (True, []),
}


@pytest.mark.parametrize("images", NORMALISED)
def test_a_student_is_trained_on_images_normalised_as_its_teachers_were(images, cli, files, weights, tmp_path, capsys):
    recorded, option = NORMALISED[images]
    path = files["vit"] if recorded is None else tmp_path / "checkpoint.pth"
    if recorded is not None:
        torch.save({"model": weights["vit"], "args": {"imagenet_default_mean_and_std": recorded}}, path)
    assert cli(select_main, *VIT.command(tmp_path / "init.pth", path)) is None
    printed = capsys.readouterr().out
    said = "the teacher's images were normalised with mean 0.5 0.5 0.5 and std 0.5 0.5 0.5, not ImageNet's; train with "
    assert (said + " ".join(HALVES) in printed) == bool(option)
    command = words_of(printed, "main.py")
    assert [word for word in command if word in HALVES] == option
    mean, std = normalization(recorded or False)
    record = json.loads((tmp_path / "init.json").read_text())
    assert record["normalization"] == {"mean": list(mean), "std": list(std)}
    for more in ([], ["--imagenet_default_mean_and_std", "false" if recorded else "true"]):
        trained_model([*command, *more])
        right = "true" if recorded else "false"
        warning = f"this run normalises by others; --imagenet_default_mean_and_std {right} gives these\n"
        assert (warning in capsys.readouterr().out) == bool(more)


def test_a_normalisation_that_main_cannot_give_is_said_before_and_in_training(cli, files, tmp_path, capsys):
    print_next(
        Namespace(student="vit_tiny", student_config="x.yaml"), SimpleNamespace(normalization=CLIP.values()), "f"
    )
    said = "normalised with mean 0.481455 0.457827 0.408211 and std 0.26863 0.261303 0.275777"
    printed = capsys.readouterr().out
    assert f"{said}, not ImageNet's; main.py has no option for that\n" in printed
    assert words_of(printed, "main.py") == ["--config", "x.yaml", "--initialize", "f"]
    assert cli(select_main, *VIT.command(tmp_path / "init.pth", files["vit"])) is None
    command = words_of(capsys.readouterr().out, "main.py")
    record = json.loads((tmp_path / "init.json").read_text())
    for normalised in (CLIP, None):
        (tmp_path / "init.json").write_text(json.dumps(record | {"normalization": normalised}))
        trained_model(command)
        printed = capsys.readouterr().out
        assert ("warning" in printed) == (normalised is not None)
        assert normalised is None or f"{said}, and this run normalises by others; " in printed


def test_no_command_for_a_student_that_main_does_not_train(capsys):
    print_next(Namespace(student="torchvision:resnet18"), None, Path("init.pth"))
    assert capsys.readouterr().out == ""


OTHERS = {  # the model that main.py is to train, with a file that is for VIT.student
    "size": "--model vit_tiny --model_kwargs embed_dim=12 depth=2 num_heads=3 --input_size 32",
    "patch": "--model vit_tiny --model_kwargs embed_dim=24 depth=2 num_heads=3 patch_size=8 --input_size 32",
    "image": "--model vit_tiny --model_kwargs embed_dim=24 depth=2 num_heads=3 --input_size 48",
}


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    """A directory with vit.pth and vit.json, which are for ``VIT.student``."""
    directory = tmp_path_factory.mktemp("made")
    select_main([str(word) for word in VIT.command(directory, files["vit"])])
    return directory


MADE_FOR = "vit.json says that it was made for --model vit_tiny --model_kwargs embed_dim=24 depth=2 num_heads=3 "
MADE_FOR += "--input_size 32: train that, or make another file: "


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_for_another_model_says_so_and_how_to_make_the_right_one(other, made, cli, tmp_path):
    with pytest.raises(InputError) as caught:
        trained_model([*OTHERS[other].split(), "--initialize", made / "vit.pth"])
    message = str(caught.value)
    assert message.startswith(f"--initialize {made}/vit.pth: does not fit this model: ")
    assert MADE_FOR in message
    words = words_of(message, "weight_selection.py")
    if other == "patch":
        words[words.index("NEW")] = tmp_path / "new.pth"
        assert cli(select_main, *words) is None
        trained_model([*OTHERS[other].split(), "--initialize", tmp_path / "new.pth"])


@pytest.mark.parametrize("path", ["", "vit.pth"])
def test_a_file_for_another_architecture_names_a_teacher_of_the_right_one(path, made):
    other = ["--model", "convnext_femto", "--model_kwargs", "dims=(8,8,8,8)", "--input_size", "32"]
    with pytest.raises(InputError) as caught:
        trained_model([*other, "--initialize", str(made / path)])
    message = str(caught.value)
    assert MADE_FOR.partition(":")[0] in message
    assert words_of(message, "weight_selection.py")[:4] == [
        *("--pretrained_model", "convnext_tiny.fb_in22k"),
        *("--student", "convnext_femto"),
    ]


WHOLE = "; a number of heads that divides 3 would keep them whole"


@pytest.mark.parametrize(
    ("teacher", "student", "rule", "warned"),
    [
        ((192, 3), (96, 4), "uniform", f"4 heads of 24 neurons are cut across the teacher's 3 of 64{WHOLE}"),
        ((192, 3), (96, 3), "uniform", None),
        ((192, 6), (96, 3), "uniform", None),
        ((192, 3), (96, 1), "random", None),
        ((192, 3), (96, 2), "random", f"2 heads of 48 neurons are cut across the teacher's 3 of 64{WHOLE}"),
        ((192, 3), (128, 2), "consecutive", None),
        ((192, 3), (96, 3), "consecutive", "3 heads of 32 neurons are cut across the teacher's 3 of 64; heads of 64"),
    ],
)
def test_heads_that_would_be_cut_across_the_teachers_are_warned_about(teacher, student, rule, warned):
    models = (
        meta("vit_tiny", img_size=32, depth=1, embed_dim=width, num_heads=heads) for width, heads in (teacher, student)
    )
    warnings = head_warnings(make_plan(*models, element_selection=rule))
    assert len(warnings) == (warned is not None)
    assert warned is None or warnings[0].startswith(f"warning: the student's {warned}")


def test_the_command_prints_warnings(cli, capsys):
    command = "--dry_run --pretrained_model vit_tiny --teacher_kwargs depth=1 img_size=32 --student_kwargs num_heads=4"
    assert cli(select_main, *command.split(), "embed_dim=96") is None
    assert "warning: the student's 4 heads" in capsys.readouterr().out
