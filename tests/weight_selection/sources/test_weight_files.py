"""Teachers' files of every layout, files that cannot be used, and files that initialise a student."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from helpers import assert_same, jax_names, meta, prefixed, random_weights, read, release_names, words, written
from pairs import CONVNEXT, PAIRS, VIT
from weight_selection.cli import main as select_main
from weight_selection.errors import InputError
from weight_selection.sources.initial_weights import load_initial

TEACHER_FILES = {
    "nested under model, beside plain values": ("x.pth", lambda w: {"model": w, "epoch": 3, "args": {"lr": 0.1}}),
    "nested under state_dict": ("x.pth.tar", lambda w: {"state_dict": w}),
    "our checkpoint without averaged weights": ("x.pth", lambda w: {"model": w, "model_ema": None, "optimizer": {}}),
    "averaged weights before others": ("x.pth", lambda w: {"model": {"a": torch.zeros(1)}, "model_ema": w}),
    "DDP": ("x.bin", lambda w: {"model": prefixed("module.", w)}),
    "torch.compile": ("x.pt", lambda w: prefixed("_orig_mod.", w)),
    "Lightning": ("x.ckpt", lambda w: {"state_dict": prefixed("model.", w), "pytorch-lightning_version": "2.5.0"}),
    "without a classifier": ("x.pth", lambda w: {key: v for key, v in w.items() if not key.startswith("head.")}),
    "other classes": ("x.pth", lambda w: {k: v[:3] if k in VIT.head + CONVNEXT.head[2:] else v for k, v in w.items()}),
    "safetensors": ("x.safetensors", lambda w: w),
    "safetensors of DDP": ("x.safetensors", lambda w: prefixed("module.", w)),
}


@pytest.mark.parametrize("layout", TEACHER_FILES)
@pytest.mark.parametrize("architecture", PAIRS)
def test_teacher_files_of_every_layout_give_the_same_student(architecture, layout, cli, weights, selected, tmp_path):
    name, convert = TEACHER_FILES[layout]
    save = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
    save(convert(weights[architecture]), tmp_path / name)
    assert cli(select_main, *PAIRS[architecture].command(tmp_path / "out", tmp_path / name)) is None
    assert_same(read(tmp_path / "out" / PAIRS[architecture].file), selected[architecture])


def test_convnext_teacher_files_can_have_their_authors_names(cli, weights, selected, tmp_path):
    torch.save({"model": release_names(weights["convnext"])}, tmp_path / "x.pth")
    assert cli(select_main, *CONVNEXT.command(tmp_path, tmp_path / "x.pth", "--include_head_norm")) is None
    content = read(tmp_path / "convnext.pth")
    assert torch.equal(content.pop("head.norm.bias"), weights["convnext"]["head.norm.bias"][::2])
    del content["head.norm.weight"]
    assert_same(content, selected["convnext"])


@pytest.fixture
def jax_file(weights, tmp_path):
    np.savez(tmp_path / "x.npz", **jax_names(weights["vit"], heads=3))
    return tmp_path / "x.npz"


def test_vit_teacher_files_can_be_of_jax(cli, jax_file, weights, selected, tmp_path):
    assert cli(select_main, *VIT.command(tmp_path, jax_file, "--include_head")) is None
    head = {"head.weight": weights["vit"]["head.weight"][:, ::2], "head.bias": weights["vit"]["head.bias"]}
    assert_same(read(tmp_path / "vit.pth"), {**selected["vit"], **head})


def test_head_of_other_classes_in_a_jax_file_is_refused(cli, jax_file, tmp_path):
    # timm would leave the classifier at random values, and those would be selected.
    kwargs = ["--teacher_kwargs", *words(VIT.large | {"num_classes": 7})]
    kwargs += ["--student_kwargs", *words(VIT.small | {"num_classes": 7})]
    message = cli(select_main, *VIT.command(tmp_path / "out", jax_file, *kwargs, "--include_head"))
    assert message is not None
    assert f"--pretrained_path {jax_file}: head" in message
    assert written(tmp_path / "out") == []


def test_convnext_teacher_files_cannot_be_of_jax(cli, jax_file, tmp_path):
    message = cli(select_main, *CONVNEXT.command(tmp_path / "out", jax_file))
    assert f"--pretrained_path {jax_file}" in message


def test_a_files_positions_are_brought_to_the_named_teachers_image_size(cli, weights, tmp_path):
    large = random_weights(meta(VIT.teacher, **VIT.large | {"img_size": 96}))
    large["pos_embed"][0, 1:] = torch.arange(6.0).repeat_interleave(6)[:, None]
    torch.save(large, tmp_path / "x.pth")
    assert cli(select_main, *VIT.command(tmp_path, tmp_path / "x.pth")) is None
    positions = read(tmp_path / "vit.pth")["pos_embed"]
    assert torch.equal(positions[:, 0], large["pos_embed"][:, 0, ::2])
    torch.testing.assert_close(positions[0, 1:].mean(), torch.tensor(2.5))
    assert positions[0, 1:3].max() < 1.5


@pytest.mark.parametrize("architecture", PAIRS)
def test_selected_weights_can_be_selected_from_again(architecture, cli, files, selected, tmp_path):
    pair = PAIRS[architecture]
    assert cli(select_main, *pair.command(tmp_path, files[architecture])) is None
    kwargs = ["--pretrained_model", pair.student, "--teacher_kwargs", *words(pair.small)]
    assert cli(select_main, *pair.command(tmp_path / "2", tmp_path / pair.file, *kwargs)) is None
    assert_same(read(tmp_path / "2" / pair.file), selected[architecture])


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def broken(files, weights, tmp_path_factory):
    """A directory of teacher files that cannot be used."""
    directory = tmp_path_factory.mktemp("broken")
    whole = files["vit"].read_bytes()
    (directory / "empty.pth").touch()
    (directory / "empty.safetensors").touch()
    (directory / "empty.npz").touch()
    (directory / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (directory / "text.pth").write_text("not weights")
    (directory / "folder.pth").mkdir()
    safetensors.torch.save_file(weights["vit"], directory / "whole.safetensors")
    packed = (directory / "whole.safetensors").read_bytes()
    (directory / "truncated.safetensors").write_bytes(packed[: len(packed) // 2])
    np.savez(directory / "other.npz", a=np.zeros(3))
    (directory / "truncated.npz").write_bytes((directory / "other.npz").read_bytes()[:60])
    content = {
        "code.pth": {**weights["vit"], "x": Malicious(directory / "code_was_run")},
        "list.pth": [torch.zeros(3)],
        "no_tensors.pth": {"epoch": 3},
        "no_names.pth": {0: torch.zeros(3)},
        "other_width.pth": {**weights["vit"], "norm.weight": torch.zeros(47)},
        "shallow.pth": {key: v for key, v in weights["vit"].items() if "blocks.3." not in key},
        "extra.pth": {**weights["vit"], "blocks.0.ls1.gamma": torch.zeros(48)},
        "nan.pth": {**weights["vit"], "blocks.1.mlp.fc1.weight": torch.full((192, 48), float("nan"))},
    }
    for name, value in content.items():
        torch.save(value, directory / name)
    return directory


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("absent.pth", "no such file"),
        ("folder.pth", "no such file"),
        ("empty.pth", ""),
        ("empty.safetensors", ""),
        ("empty.npz", ""),
        ("truncated.pth", "truncated"),
        ("truncated.safetensors", ""),
        ("truncated.npz", ""),
        ("other.npz", ""),
        ("text.pth", ""),
        ("code.pth", "code"),
        ("list.pth", "state_dict"),
        ("no_tensors.pth", "state_dict"),
        ("no_names.pth", "state_dict"),
        ("other_width.pth", "norm.weight is (47,), the model's is (48,)"),
        ("shallow.pth", "blocks.3.norm1.weight is missing"),
        ("extra.pth", "blocks.0.ls1.gamma"),
        ("nan.pth", "finite"),
    ],
)
def test_teacher_files_that_cannot_be_used_are_refused(name, named, cli, broken, tmp_path):
    message = cli(select_main, *VIT.command(tmp_path, broken / name))
    assert message is not None
    assert f"--pretrained_path {broken / name}: " in message
    assert named in message
    assert written(tmp_path) == []
    assert not (broken / "code_was_run").exists()


@pytest.mark.parametrize(("key", "read"), [("blocks.0.mlp.fc1.weight", True), ("blocks.3.mlp.fc1.weight", False)])
def test_only_what_is_selected_is_read_and_checked(key, read, cli, files, weights, selected, tmp_path):
    content = bytearray(files["vit"].read_bytes())
    content[content.index(weights["vit"][key].numpy().tobytes()) + 5] ^= 1
    (tmp_path / "changed.pth").write_bytes(content)
    message = cli(select_main, *VIT.command(tmp_path / "out", tmp_path / "changed.pth"))
    if read:
        assert "changed.pth: " in message and "check sum" in message
        assert written(tmp_path / "out") == []
    else:
        assert message is None
        assert_same(torch.load(tmp_path / "out" / "vit.pth", weights_only=True), selected["vit"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.uint16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_numbers_that_no_weights_are_made_of_are_refused(dtype, suffix, cli, weights, tmp_path):
    path = tmp_path / f"odd{suffix}"
    odd = weights["vit"] | {"norm.weight": weights["vit"]["norm.weight"].to(dtype)}
    torch.save(odd, path) if suffix == ".pth" else safetensors.torch.save_file(odd, path)
    message = cli(select_main, *VIT.command(tmp_path / "out", path))
    assert f"odd{suffix}: " in message
    assert written(tmp_path / "out") == []


def test_compressed_archive_is_read_too(cli, files, selected, tmp_path):
    with (
        zipfile.ZipFile(files["vit"]) as whole,
        zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    assert cli(select_main, *VIT.command(tmp_path / "out", tmp_path / "x.pth")) is None
    assert_same(torch.load(tmp_path / "out" / "vit.pth", weights_only=True), selected["vit"])


@pytest.mark.parametrize(("architecture", "other"), [("convnext", "vit"), ("vit", "convnext")])
def test_teacher_files_of_another_architecture_are_refused(architecture, other, cli, files, tmp_path):
    message = cli(select_main, *PAIRS[architecture].command(tmp_path, files[other]))
    assert message is not None
    assert f"--pretrained_path {files[other]}: " in message
    assert written(tmp_path) == []


def test_a_refused_teacher_does_not_cost_the_file_that_was_there(cli, files, broken, selected, tmp_path):
    assert cli(select_main, *VIT.command(tmp_path, files["vit"])) is None
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert cli(select_main, *VIT.command(tmp_path, broken / "nan.pth", "--overwrite")) is not None
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("architecture", "change", "named"),
    [
        ("vit", lambda w: {**w, "norm.weight": torch.zeros(25)}, r"norm\.weight is \(25,\), the model's is \(24,\)"),
        ("vit", lambda w: {key: v for key, v in w.items() if key != "pos_embed"}, "pos_embed is missing"),
        ("vit", lambda w: {**w, "blocks.2.norm1.bias": torch.zeros(24)}, r"blocks\.2\.norm1\.bias is not a key"),
        ("vit", lambda w: {**w, "head.weight": torch.zeros(7, 24)}, r"head\.weight is \(7, 24\)"),
        ("convnext", lambda w: {**w, "stem.0.bias": torch.zeros(5)}, r"stem\.0\.bias is \(5,\)"),
    ],
)
def test_initial_files_must_fit_the_student(architecture, change, named, selected, tmp_path):
    student = PAIRS[architecture].student_model()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    torch.save(change(selected[architecture]), tmp_path / "x.pth")
    with pytest.raises(InputError, match=f"--initialize {re.escape(str(tmp_path / 'x.pth'))}: .*{named}"):
        load_initial(student, tmp_path / "x.pth", "--initialize")
    assert_same(student.state_dict(), before)


@pytest.mark.parametrize(("architecture", "first"), [("vit", "cls_token"), ("convnext", r"stem\.0\.weight")])
def test_initial_files_of_another_architecture_are_refused(architecture, first, selected, tmp_path):
    other = "convnext" if architecture == "vit" else "vit"
    torch.save(selected[other], tmp_path / "x.pth")
    with pytest.raises(InputError, match=f"{first} is missing"):
        load_initial(PAIRS[architecture].student_model(), tmp_path / "x.pth", "--initialize")


def test_initial_files_changed_since_their_record_are_refused(cli, files, selected, tmp_path):
    assert cli(select_main, *VIT.command(tmp_path, files["vit"])) is None
    torch.save({**selected["vit"], "pos_embed": torch.zeros(1, 5, 24)}, tmp_path / "vit.pth")
    with pytest.raises(InputError, match=r"vit\.pth: changed since vit\.json"):
        load_initial(VIT.student_model(), tmp_path / "vit.pth", "--initialize")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"left_out": 3, "sha256": ""}'])
def test_a_record_of_something_else_is_refused(content, selected, tmp_path):
    torch.save(selected["vit"], tmp_path / "x.pth")
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.json"):
        load_initial(VIT.student_model(), tmp_path / "x.pth", "--initialize")
