"""The command: its options, the plan that it prints, its files, and what it refuses."""

import hashlib
import json
import re
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

from helpers import assert_same, meta, random_weights, read, words, written
from pairs import CONVNEXT, PAIRS, RESNET, VIT
from weight_selection.apply import apply_plan
from weight_selection.cli import main as select_main
from weight_selection.errors import InputError
from weight_selection.options import ELEMENT_SELECTION
from weight_selection.plan import make_plan
from weight_selection.sources.initial_weights import load_initial
from weight_selection.sources.timm_models import create_model

EXCLUDED = {  # which keys a component has, in words of the models rather than of the declarations
    ("vit", "patch_embed"): lambda key: key.startswith("patch_embed."),
    ("vit", "pos_embed"): lambda key: key == "pos_embed",
    ("vit", "attention"): lambda key: ".attn." in key,
    ("vit", "norm"): lambda key: "norm" in key,
    ("vit", "mlp"): lambda key: ".mlp." in key,
    ("convnext", "patch_embed"): lambda key: key.startswith("stem.0."),
    ("convnext", "norm"): lambda key: "norm" in key or "stem.1." in key or "downsample.0." in key,
    ("convnext", "mlp"): lambda key: ".mlp." in key,
}


@pytest.mark.parametrize(("architecture", "component"), EXCLUDED)
def test_excluded_components_are_absent_and_the_record_lets_the_file_load(
    architecture, component, cli, files, selected, tmp_path
):
    pair = PAIRS[architecture]
    command = pair.command(tmp_path, files[architecture], "--exclude", component)
    assert cli(select_main, *command) is None
    path = tmp_path / pair.file
    expected = {
        key: value for key, value in selected[architecture].items() if not EXCLUDED[architecture, component](key)
    }
    absent = [key for key in pair.models()[1].state_dict() if key not in expected]
    assert len(expected) < len(selected[architecture])
    assert_same(read(path), expected)
    assert json.loads(path.with_suffix(".json").read_text())["left_out"] == absent

    student = pair.student_model()
    assert load_initial(student, path, "--initialize") == absent
    path.with_suffix(".json").unlink()  # without it, nobody asked for these keys to be missing
    first = next(key for key in absent if key not in pair.head)
    with pytest.raises(InputError, match=f"--initialize {re.escape(str(path))}: .*{re.escape(first)} is missing"):
        load_initial(student, path, "--initialize")


def test_several_components_can_be_excluded(cli, files, tmp_path):
    command = VIT.command(tmp_path, files["vit"], "--exclude", "mlp", "attention")
    assert cli(select_main, *command) is None
    assert not [key for key in read(tmp_path / "vit.pth") if ".mlp." in key or ".attn." in key]


@pytest.mark.parametrize(
    ("component", "inside"),
    [("norm", "bn|downsample.1"), ("patch_embed", "^conv1"), ("mlp", None), ("pos_embed", None)],
)
def test_components_of_any_architecture_can_be_excluded(component, inside, cli, tmp_path):
    torch.save(create_model(RESNET.teacher, **RESNET.large).state_dict(), tmp_path / "teacher.pth")
    command = RESNET.command(tmp_path / "out.pth", tmp_path / "teacher.pth", "--exclude", component)
    message = cli(select_main, *command)
    if inside is None:
        assert message == f"--exclude {component}: resnet has no such component; it has norm, patch_embed"
        return
    assert message is None
    keys = [key for key in RESNET.student_model().state_dict() if key not in RESNET.head]
    assert list(read(tmp_path / "out.pth")) == [key for key in keys if not re.search(inside, key)]


def test_head_is_selected_on_request_with_all_classes(cli, files, weights, selected, tmp_path):
    command = VIT.command(tmp_path, files["vit"], "--include_head")
    assert cli(select_main, *command) is None
    head = {"head.weight": weights["vit"]["head.weight"][:, ::2], "head.bias": weights["vit"]["head.bias"]}
    assert_same(read(tmp_path / "vit.pth"), {**selected["vit"], **head})
    assert json.loads((tmp_path / "vit.json").read_text())["left_out"] == []
    assert load_initial(VIT.student_model(), tmp_path / "vit.pth", "--initialize") == []


def test_head_norm_of_convnext_is_selected_on_request(cli, files, weights, tmp_path):
    command = CONVNEXT.command(tmp_path, files["convnext"], "--include_head_norm")
    assert cli(select_main, *command) is None
    content = read(tmp_path / "convnext.pth")
    assert [key for key in content if key.startswith("head.")] == ["head.norm.weight", "head.norm.bias"]
    assert torch.equal(content["head.norm.weight"], weights["convnext"]["head.norm.weight"][::2])
    assert json.loads((tmp_path / "convnext.json").read_text())["left_out"] == ["head.fc.weight", "head.fc.bias"]


def test_head_of_convnext_comes_with_its_norm(cli, files, tmp_path):
    command = CONVNEXT.command(tmp_path, files["convnext"], "--include_head")
    assert cli(select_main, *command) is None
    assert set(CONVNEXT.head) <= read(tmp_path / "convnext.pth").keys()


def test_head_that_the_teacher_file_does_not_have_is_refused(cli, weights, tmp_path):
    backbone = {key: value for key, value in weights["vit"].items() if not key.startswith("head.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    command = VIT.command(tmp_path / "out", tmp_path / "backbone.pth")
    message = cli(select_main, *command, "--include_head")
    assert f"--pretrained_path {tmp_path / 'backbone.pth'}: head.weight" in message
    assert written(tmp_path / "out") == []
    assert cli(select_main, *command) is None  # and is not needed otherwise


def test_head_that_timm_replaced_by_a_random_one_is_refused(cli, files, tmp_path):
    # Asked for another number of classes than the published weights have, timm drops their classifier silently.
    kwargs = [
        *words(VIT.large | {"num_classes": 7}),
        f"pretrained_cfg_overlay={{'file':'{files['vit']}','custom_load':False}}",
    ]
    named = ["--pretrained_model", "vit_small_patch16_224", "--teacher_kwargs", *kwargs]
    named += ["--student", "vit_tiny", "--student_kwargs", *words(VIT.small | {"num_classes": 7})]
    message = cli(select_main, *named, "--output_dir", tmp_path, "--include_head")
    assert message is not None
    assert "--include_head" in message
    assert written(tmp_path) == []


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_named_output_files_hold_the_same_tensors(suffix, cli, files, selected, tmp_path):
    path = tmp_path / "new" / f"init{suffix}"
    assert cli(select_main, *VIT.command(path, files["vit"])) is None
    assert written(tmp_path) == ["init.json", path.name]
    assert_same(safetensors.torch.load_file(path) if suffix == ".safetensors" else read(path), selected["vit"])
    assert json.loads((tmp_path / "new" / "init.json").read_text())["file"] == path.name
    assert load_initial(VIT.student_model(), path, "--initialize") == VIT.head


def test_random_selection_follows_the_seed_and_nothing_else(cli, files, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command = VIT.command(tmp_path / f"{name}.pth", files["vit"], "--element_selection", "random", "--seed", seed)
        assert cli(select_main, *command) is None
        torch.manual_seed(seed + 5)
    a, b, c = (read(tmp_path / f"{name}.pth") for name in "abc")
    assert_same(a, b)
    assert not torch.equal(a["pos_embed"], c["pos_embed"])
    assert json.loads((tmp_path / "c.json").read_text())["options"]["seed"] == 2


@pytest.mark.parametrize("method", ELEMENT_SELECTION)
@pytest.mark.parametrize("architecture", PAIRS)
def test_every_element_rule_gives_a_file_the_student_loads(architecture, method, cli, files, tmp_path):
    pair = PAIRS[architecture]
    command = pair.command(tmp_path, files[architecture], "--element_selection", method)
    assert cli(select_main, *command) is None
    assert load_initial(pair.student_model(), tmp_path / pair.file, "--initialize") == pair.head


@pytest.mark.parametrize(
    ("model_type", "teacher", "student"),
    [("vit", "vit_small_patch16_224_in21k", "vit_tiny"), ("convnext", "convnext_tiny_in22k", "convnext_femto")],
)
def test_dry_run_prints_every_key_and_touches_nothing(model_type, teacher, student, cli, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--dry_run", "--model_type", model_type, "--pretrained_model", teacher, "--output_dir", "out"]
    assert cli(select_main, *command, "--verbose") is None
    lines = capsys.readouterr().out.splitlines()
    lines = lines[next(number for number, line in enumerate(lines) if line.startswith("student key")) :]
    first_words = [line.split()[0] for line in lines]
    expected = {key: "x".join(map(str, value.shape)) for key, value in meta(student).state_dict().items()}
    assert first_words[1 : 1 + len(expected)] == list(expected)
    assert all(shape in line for line, shape in zip(lines[1:], expected.values(), strict=False))
    assert not list(tmp_path.iterdir())


def test_dry_run_says_where_each_tensor_comes_from_and_by_which_rule(cli, capsys):
    named = f"--pretrained_model deit_small_distilled_patch16_224 --teacher_kwargs {' '.join(words(VIT.large))}"
    options = "img_size=48 --layer_selection last_n --exclude mlp --allow_unused --dry_run --verbose --student vit_tiny"
    command = f"{named} {options} --student_kwargs {' '.join(words(VIT.small))}".split()
    assert cli(select_main, *command) is None
    rows = {line.split()[0]: re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()}
    assert rows["blocks.0.attn.qkv.weight"][1:] == [
        "72x24",
        "blocks.2.attn.qkv.weight",
        "144x48",
        "uniform in each of 3 parts",
    ]
    assert rows["pos_embed"][4] == "first 1 of 2 prefix tokens, resample 3x3 to 2x2, uniform"
    assert rows["blocks.0.mlp.fc1.weight"][2:] == ["-", "-", "excluded: student's own initialisation"]
    assert rows["head.bias"][4] == "classifier: student's own initialisation"


def test_dry_run_shows_neuron_groups_layers_and_totals_first(cli, capsys):
    command = ["--dry_run", "--student", "vit_a", "--pretrained_model", "vit_small", "--layer_selection", "uniform"]
    assert cli(select_main, *command) is None
    lines = capsys.readouterr().out.splitlines()
    assert "stream: 384 -> 192, every 2nd, in 66 tensors" in lines
    assert "blocks.{0..5}.mlp: 1536 -> 768, every 2nd, in 3 tensors each" in lines
    assert "blocks.{0..5} from 0, 2, 4, 6, 8, 10" in lines
    assert lines[-1] == "vit_a from vit_small: 78 selected, 2 classifier; nothing written"
    assert not any(line.startswith("blocks.0.attn.qkv.weight") for line in lines)


def test_existing_files_are_kept_unless_told_otherwise(cli, files, selected, tmp_path):
    path = tmp_path / "vit.pth"
    path.write_text("precious")
    message = cli(select_main, *VIT.command(tmp_path, files["vit"]))
    assert f"--output_dir {tmp_path}" in message
    assert "--overwrite" in message
    assert path.read_text() == "precious"
    assert cli(select_main, *VIT.command(tmp_path, files["vit"], "--overwrite")) is None
    assert_same(read(path), selected["vit"])


@pytest.mark.parametrize("below", ["folder.pth", "regular/file/init.pth", "regular", "regular/directory"])
def test_outputs_that_cannot_be_written_are_refused(below, cli, files, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "regular").write_text("not a directory")
    message = cli(select_main, *VIT.command(tmp_path / below, files["vit"], "--overwrite"))
    assert message is not None
    assert f"--output_dir {tmp_path}" in message
    assert written(tmp_path) == ["regular"]
    assert (tmp_path / "regular").read_text() == "not a directory"


ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch, capsys):
    """Run weight_selection.py as a program, with the hub's cache in a directory: exit status, and what it prints."""

    def run(hub_cache, *words):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
        monkeypatch.setattr(sys, "argv", ["weight_selection.py", *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "weight_selection.py"), run_name="__main__")
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


def test_published_weights_come_from_the_cache_of_the_hub(program, tmp_path):
    # The layout in which huggingface_hub keeps what it downloaded; timm itself finds and loads the file.
    repository = tmp_path / "models--timm--vit_small_patch16_224.augreg_in21k"
    for directory in ("refs", "snapshots/abc"):
        (repository / directory).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    file = repository / "snapshots" / "abc" / "model.safetensors"
    kwargs = {key: value for key, value in VIT.large.items() if key != "num_classes"}
    teacher = meta("vit_small_patch16_224_in21k", **kwargs)
    weights = random_weights(teacher)
    safetensors.torch.save_file(weights, file)

    command = ["--model_type", "vit", "--pretrained_model", "vit_small_patch16_224_in21k"]
    command += ["--output_dir", tmp_path / "out", "--teacher_kwargs", *words(kwargs)]
    status, _, error = program(tmp_path, *command, "--student_kwargs", *words(VIT.small))
    assert status == 0, error
    assert_same(read(tmp_path / "out" / "vit.pth"), apply_plan(make_plan(teacher, VIT.models()[1]), weights))
    assert json.loads((tmp_path / "out" / "vit.json").read_text())["teacher"] == {
        "name": "vit_small_patch16_224_in21k",
        "model": "vit_small_patch16_224.augreg_in21k",
        "kwargs": kwargs,
        "source": "timm/vit_small_patch16_224.augreg_in21k",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def test_program_refuses_with_one_line_and_status_2(program, tmp_path):
    name = "vit_small_patch16_224_in21k"
    named = ["--model_type", "vit", "--pretrained_model", name, "--output_dir", tmp_path / "out"]
    status, printed, error = program(tmp_path / "empty", *named)
    assert status == 2
    assert printed == ""
    assert len(error.splitlines()) == 1, error
    assert error.startswith(f"weight_selection.py: error: --pretrained_model {name}: ")
    assert "--pretrained_path" in error
    assert written(tmp_path) == []
