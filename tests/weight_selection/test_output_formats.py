"""What a selection leaves on disk: directories of the hub's layout, types of values, metadata; whole or not at all."""

import json
import resource
import stat
from types import SimpleNamespace

import pytest
import safetensors
import timm
import torch
import torch.nn as nn

from helpers import assert_same, read, words, written
from pairs import CONVNEXT, PAIRS, VIT
from weight_selection import output
from weight_selection.cli import main as select_main
from weight_selection.errors import InputError
from weight_selection.selection import Student, Teacher
from weight_selection.sources import facts, timm_hub


@pytest.mark.parametrize("architecture", PAIRS)
def test_timm_opens_a_directory_with_the_selection_and_the_students_own_classifier(architecture, cli, files, tmp_path):
    pair, file = PAIRS[architecture], files[architecture]
    assert cli(select_main, *pair.command(tmp_path / "whole.pth", file, "--complete", "--seed", 3)) is None
    assert cli(select_main, *pair.command(tmp_path / "hub", file, "--format", "hub", "--seed", 3)) is None
    assert written(tmp_path / "hub") == ["config.json", "model.json", "model.safetensors"]
    opened = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert_same(opened.state_dict(), read(tmp_path / "whole.pth"))
    assert json.loads((tmp_path / "hub" / "model.json").read_text())["random"] == pair.head
    mode = (tmp_path / "whole.pth").stat().st_mode
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "hub").iterdir()} == {stat.S_IMODE(mode)}


def test_a_directory_says_how_the_teachers_images_were_normalised(cli, weights, tmp_path):
    run = {"imagenet_default_mean_and_std": True}  # of the teacher's training by main.py; timm's ViTs have 0.5
    torch.save({"model": weights["vit"], "args": run}, tmp_path / "teacher.pth")
    assert cli(select_main, *VIT.command(tmp_path / "hub", tmp_path / "teacher.pth", "--format", "hub")) is None
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    assert "tag" not in config["pretrained_cfg"] or not config["pretrained_cfg"]["tag"]
    assert config["model_args"].items() >= {"embed_dim": 24, "depth": 2, "num_heads": 3}.items()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--complete"], ["--complete", "--format hub"]),
        (["--output_dir", "x.safetensors"], ["--output_dir x.safetensors", "leave the suffix out"]),
        (["--student", "vit_tiny_clip", "--allow_unused"], ["cannot rebuild vit_tiny_clip", "norm_layer="]),
    ],
)
def test_a_directory_that_cannot_be_written_as_asked_is_refused(more, named, cli, files, tmp_path):
    command = VIT.command(tmp_path / "hub", files["vit"], "--format", "hub", *more)
    if "vit_tiny_clip" in more:  # the teacher needs the normalisation that comes first
        command += ["--teacher_kwargs", *words(VIT.large | {"pre_norm": True})]
        command.remove("--pretrained_path")
        command.remove(files["vit"])
    message = cli(select_main, *command)
    assert all(word in message for word in named), message
    assert written(tmp_path) == []


def test_arguments_that_a_name_fixes_are_refused_for_a_directory():
    student, teacher = Student("lcnet_100", {"channel_multiplier": 0.5}), Teacher("lcnet_100")
    models = teacher.create("meta"), student.create("meta")
    with pytest.raises(InputError, match="^--format hub: timm cannot rebuild lcnet_100 .*'channel_multiplier'; leave"):
        timm_hub.configuration(SimpleNamespace(student=student, teacher=teacher, models=models))


@pytest.mark.parametrize("there", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_directory_of_a_model_is_kept_unless_told_otherwise(there, cli, files, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text("mine")
    (hub / there).write_text("precious")
    command = VIT.command(hub, files["vit"], "--format", "hub")
    message = cli(select_main, *command)
    assert there in message
    assert "--overwrite" in message
    assert written(hub) == sorted(["README.md", there])
    assert cli(select_main, *command, "--overwrite") is None
    assert timm.create_model(f"local-dir:{hub}", pretrained=True).num_classes == 5
    assert (hub / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_the_teachers_own_files_are_never_written(cli, weights, tmp_path):
    own = tmp_path / "teacher" / "model.pth"
    own.parent.mkdir()
    torch.save(weights["vit"], own)
    before = own.read_bytes()
    message = cli(select_main, *VIT.command(own.parent, own, "--format", "hub", "--overwrite"))
    assert "holds the teacher's own weights" in message
    (tmp_path / "link").symlink_to(own.parent)
    message = cli(select_main, *VIT.command(tmp_path / "link" / "model.pth", own, "--overwrite"))
    assert "is the teacher's own file" in message
    assert own.read_bytes() == before
    assert written(tmp_path / "teacher") == ["model.pth"]


@pytest.mark.parametrize("more", [["--format", "hub"], []])
def test_safetensors_say_in_themselves_where_they_come_from(more, cli, files, tmp_path):
    path = tmp_path / "hub" / "model.safetensors" if more else tmp_path / "init.safetensors"
    assert cli(select_main, *VIT.command(path.parent if more else path, files["vit"], *more)) is None
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside.pop("sha256")
    assert metadata.keys() == {"format", "provenance"}
    assert metadata["format"] == "pt"
    assert json.loads(metadata["provenance"]) == beside
    assert len(beside["teacher"]["sha256"]) == 64


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "keep"])
def test_values_are_written_in_the_type_that_was_asked_for(dtype, cli, files, selected, tmp_path, capsys):
    assert cli(select_main, *CONVNEXT.command(tmp_path / "init.pth", files["convnext"], "--dtype", dtype)) is None
    wanted = torch.float32 if dtype == "keep" else getattr(torch, dtype)
    content = read(tmp_path / "init.pth")
    assert_same(content, {key: value.to(wanted) for key, value in selected["convnext"].items()})
    assert capsys.readouterr().out.splitlines()[0].endswith(f"values, {str(wanted).removeprefix('torch.')}")
    options = json.loads((tmp_path / "init.json").read_text())["options"]
    assert options.get("dtype", "keep") == dtype


def test_values_beyond_the_range_of_a_type_are_refused(cli, weights, tmp_path):
    large = {key: value * 1e8 if key == "norm.weight" else value for key, value in weights["vit"].items()}
    torch.save(large, tmp_path / "teacher.pth")
    command = VIT.command(tmp_path / "init.pth", tmp_path / "teacher.pth", "--dtype", "float16")
    assert "--dtype float16: norm.weight has values beyond its range" in cli(select_main, *command)
    assert written(tmp_path) == ["teacher.pth"]


def test_a_directory_has_values_of_one_type(cli, weights, tmp_path):
    torch.save({key: value.half() for key, value in weights["vit"].items()}, tmp_path / "teacher.pth")
    assert cli(select_main, *VIT.command(tmp_path / "hub", tmp_path / "teacher.pth", "--format", "hub")) is None
    content = safetensors.torch.load_file(tmp_path / "hub" / "model.safetensors")
    assert {value.dtype for value in content.values()} == {torch.float16}


@pytest.mark.parametrize("more", [["--format", "hub"], []])
def test_a_full_disk_leaves_nothing(more, cli, files, tmp_path):
    path = tmp_path / "out" / ("hub" if more else "init.safetensors")
    path.parent.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        message = cli(select_main, *VIT.command(path, files["vit"], *more))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot" in message
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("more", [["--format", "hub"], []])
def test_a_large_student_is_written_without_being_built(more, cli, files, selected, tmp_path, capsys, monkeypatch):
    path = tmp_path / "hub" / "model.safetensors" if more else tmp_path / "init.safetensors"
    monkeypatch.setattr(output, "LARGE", 1000)
    create = Student.create
    devices = []

    def noted(self, device="cpu"):
        devices.append(device)
        return create(self, device)

    monkeypatch.setattr(Student, "create", noted)
    assert cli(select_main, *VIT.command(path.parent if more else path, files["vit"], *more)) is None
    assert devices == (["meta", "cpu"] if more else ["meta"])  # a classifier of timm's is made with the whole model
    assert "not run: only a student of less than" in capsys.readouterr().out
    content = safetensors.torch.load_file(path)
    assert_same({key: content[key] for key in selected["vit"]}, selected["vit"])
    assert sorted(content.keys() - selected["vit"].keys()) == (sorted(VIT.head) if more else [])


class _Tokens(nn.Module):
    """Takes tokens and a mask by name; its output is finite only if the mask hides nothing."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, tokens, attention_mask):
        hidden = self.embedding(tokens) * self.scale
        return {"hidden": (hidden / attention_mask[..., None], None), "tokens": tokens}


def test_a_students_trial_takes_inputs_and_outputs_of_any_kind(monkeypatch):
    tokens = torch.empty(1, 4, dtype=torch.int64, device="meta")
    student = _Tokens()
    inputs = {"tokens": tokens, "attention_mask": tokens}
    given = facts.facts_of(student, inputs)
    monkeypatch.setattr(output, "facts_of", lambda model: given)
    output.try_forward(student)
    student.scale.data[1] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        output.try_forward(student)
