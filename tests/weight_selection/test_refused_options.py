"""Options that cannot work, and configurations that name no student, are refused in one line."""

import json

import pytest

from helpers import assert_same, read, words, written
from pairs import CONVNEXT, PAIRS, VIT
from weight_selection.cli import main as select_main

VIT_96 = words(VIT.small | {"embed_dim": 96})

REFUSED_OPTIONS = {
    "unknown teacher": ("vit", ["--pretrained_model", "vit_smal"], ["--pretrained_model vit_smal:", "vit_small"]),
    "unknown student": ("vit", ["--student", "vit_tinny"], ["--student vit_tinny:", "vit_tiny"]),
    "unknown tag": ("vit", ["--pretrained_model", "vit_small_patch16_224.in99k"], ["--pretrained_model", "in99k"]),
    "narrower teacher": ("vit", ["--student_kwargs", *VIT_96], ["cls_token, dimension 2", "48", "96"]),
    "shallower teacher": ("vit", ["--student_kwargs", *words(VIT.small | {"depth": 6})], ["blocks", " 4 ", " 6"]),
    "shallower stage": (
        "convnext",
        ["--student_kwargs", *words(CONVNEXT.small | {"depths": (1, 1, 4, 1)})],
        ["stages.2.blocks", " 3 ", " 4"],
    ),
    "other kernel": ("convnext", ["--student_kwargs", *words(CONVNEXT.small), "kernel_sizes=5"], ["conv_dw", "7", "5"]),
    "other architecture": (
        "vit",
        ["--student", "convnext_femto", "--student_kwargs", *words(CONVNEXT.small)],
        ["teacher is a vit model", "convnext"],
    ),
    "other model type": ("vit", ["--model_type", "convnext"], ["--model_type convnext", "--student vit_tiny"]),
    "undeclared architecture": ("vit", ["--student", "resnet18", "--student_kwargs"], ["a vit model", "resnet"]),
    "seed without effect": ("vit", ["--seed", "3"], ["--seed 3", "uniform"]),
    "too large a seed": ("vit", ["--seed", f"{2**63}", "--element_selection", "random"], [f"--seed {2**63}: give a w"]),
    "negative seed": ("vit", ["--seed", "-1", "--element_selection", "random"], ["--seed -1"]),
    "no such component": ("convnext", ["--exclude", "pos_embed"], ["--exclude pos_embed", "convnext", "patch_embed"]),
    "unknown component": ("vit", ["--exclude", "stem"], ["--exclude", "stem", "patch_embed"]),
    "other classes": (
        "vit",
        ["--include_head", "--student_kwargs", *words(VIT.small | {"num_classes": 7})],
        ["--include_head", "5", "7"],
    ),
    "no classifier": (
        "vit",
        ["--include_head", "--student_kwargs", *words(VIT.small | {"num_classes": 0})],
        ["--include_head"],
    ),
    "no norm in the head": ("vit", ["--include_head_norm"], ["--include_head_norm", "vit"]),
    "width no multiple of heads": (
        "vit",
        ["--student_kwargs", *words(VIT.small | {"embed_dim": 25})],
        ["--student vit_tiny", "embed_dim=25"],
    ),
    "word without =": ("vit", ["--student_kwargs", "depth"], ["--student_kwargs depth"]),
    "false argument": ("vit", ["--student_kwargs", "class_token=false"], ["class_token=False: Token pooling"]),
    "misspelt argument": ("vit", ["--teacher_kwargs", "depht=4"], ["--pretrained_model vit_small", "depht"]),
    "argument of ours": ("vit", ["--student_kwargs", *words(VIT.small), "device=cpu"], ["--student", "device"]),
    "too few stages": ("convnext", ["--student_kwargs", "depths=(1,1)"], ["--student convnext_femto", "depths=(1, 1)"]),
    "unknown rule": ("vit", ["--element_selection", "unifrom"], ["--element_selection", "unifrom", "uniform"]),
    "abbreviation": ("vit", ["--dry"], ["--dry"]),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_options_that_cannot_work_are_refused_before_anything_is_written(case, cli, files, tmp_path):
    architecture, more, named = REFUSED_OPTIONS[case]
    message = cli(select_main, *PAIRS[architecture].command(tmp_path, files[architecture], *more))
    assert message is not None
    assert all(word in message for word in named), message
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--pretrained_model", "vit_small", "--output_dir", "x"], ["--student", "--model_type"]),
        (["--student", "vit_tiny", "--output_dir", "x"], ["--pretrained_model", "--model_type"]),
        (["--model_type", "vit"], ["--output_dir", "--dry_run"]),
    ],
)
def test_missing_options_are_named(given, named, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = cli(select_main, *given)
    assert all(word in message for word in named), message
    assert written(tmp_path) == []


def test_a_student_can_be_that_of_a_configuration_of_main(cli, files, selected, tmp_path):
    kwargs = "".join(
        f"  {key}: {value}\n" for key, value in VIT.small.items() if key not in ("img_size", "num_classes")
    )
    config = f"model: {VIT.student}\ninput_size: 32\nepochs: 7\nmodel_kwargs:\n{kwargs}"
    (tmp_path / "student.yaml").write_text(config)
    named = VIT.command(tmp_path, files["vit"])
    command = [*named[: named.index("--student")], *named[named.index("--output_dir") :]]
    assert cli(select_main, *command, "--student_config", tmp_path / "student.yaml") is None
    assert_same(read(tmp_path / "vit.pth"), selected["vit"])
    student = json.loads((tmp_path / "vit.json").read_text())["student"]
    assert (student["name"], student["kwargs"]["embed_dim"], student["input_size"]) == (VIT.student, 24, 32)


def test_a_configuration_without_a_size_has_that_of_main(cli, tmp_path, capsys):
    (tmp_path / "student.yaml").write_text("model: test_vit\n")  # which timm builds for 160 pixels
    given = ["--dry_run", "--verbose", "--pretrained_model", "test_vit", "--student_config", tmp_path / "student.yaml"]
    assert cli(select_main, *given) is None
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("pos_embed"))
    assert line.split()[1] == "1x197x64"


@pytest.mark.parametrize(
    ("text", "more", "named"),
    [
        ("model: vit_tiny", ["--student", "vit_tiny"], ["student.yaml", "leave --student out"]),
        ("epochs: 3", [], ["student.yaml", "has no model"]),
        ("model: vit_tiny\ninput_sise: 3", [], ["--student_config", "input_sise is not an option"]),
        ("model: [", [], ["--student_config", "not YAML"]),
        ("model: vit_teeny", [], ["--student vit_teeny: no such model"]),
    ],
)
def test_configurations_that_name_no_student_are_refused(text, more, named, cli, tmp_path):
    (tmp_path / "student.yaml").write_text(text)
    config = ["--student_config", tmp_path / "student.yaml"]
    message = cli(select_main, "--dry_run", "--pretrained_model", "vit_small", *config, *more)
    assert all(word in message for word in named), message
