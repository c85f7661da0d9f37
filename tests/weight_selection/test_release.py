"""The commands of the paper's release, at real size: the same tensors, keys, files and record."""

import hashlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import timm
import torch

from helpers import assert_same, meta, random_weights, read, written
from pairs import PAIRS
from weight_selection import select_weights
from weight_selection.cli import main as select_main
from weight_selection.sources.initial_weights import load_initial
from weight_selection.sources.timm_models import create_model

IMAGES = {  # how timm says that the teachers' were normalised
    "vit": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "convnext": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}


def release_vit(teacher):
    """Every second neuron, in q, k and v each."""
    out = {}
    for key, value in teacher.items():
        if key.startswith("head."):
            continue
        if ".qkv." in key:
            q, k, v = value[0:384], value[384:768], value[768:1152]
            value = torch.cat([q[::2], k[::2], v[::2]])
            out[key] = value[:, ::2] if value.ndim == 2 else value
        elif value.ndim == 3:
            out[key] = value[:, :, ::2]
        elif value.ndim == 2:
            out[key] = value[::2, ::2]
        else:
            out[key] = value[::2]
    return out


def release_convnext(teacher):
    """Every second neuron of the first layers of each stage."""
    depths = {"0": 2, "1": 2, "2": 6, "3": 2}
    out = {}
    for key, value in teacher.items():
        block = re.match(r"stages\.(\d)\.blocks\.(\d)\.", key)
        if key.startswith("head.") or (block and int(block[2]) >= depths[block[1]]):
            continue
        out[key] = value[::2, ::2] if value.ndim == 2 or ".downsample.1.weight" in key else value[::2]
    return out


@pytest.fixture(scope="module", params=["vit", "convnext"])
def release(request, tmp_path_factory):
    """What the release's README command writes, from a made-up teacher of the real shapes."""
    root = tmp_path_factory.mktemp("release")
    name, oracle, student = {
        "vit": ("vit_small_patch16_224_in21k", release_vit, "vit_tiny"),
        "convnext": ("convnext_tiny_in22k", release_convnext, "convnext_femto"),
    }[request.param]
    model = meta(name)
    teacher = random_weights(model)
    torch.save(teacher, root / "teacher.pth")
    readme = f"--output_dir {root}/weight_selection/ --model_type {request.param} --pretrained_model {name}"
    select_main([*readme.split(), "--pretrained_path", str(root / "teacher.pth")])
    return SimpleNamespace(
        architecture=request.param,
        name=name,
        student=student,
        classes=model.num_classes,
        expected=oracle(teacher),
        teacher_file=root / "teacher.pth",
        directory=root / "weight_selection",
        file=root / "weight_selection" / f"{request.param}.pth",
    )


def test_release_commands_write_the_file_named_after_the_architecture_and_its_record(release):
    assert release.classes == {"vit": 21843, "convnext": 21841}[release.architecture]
    assert written(release.directory) == [f"{release.architecture}.json", f"{release.architecture}.pth"]


def test_release_commands_give_the_release_tensors_bit_for_bit(release):
    content = read(release.file)
    assert_same(content, release.expected)
    assert all(value.dtype == torch.float32 for value in content.values())


def test_release_commands_write_the_students_keys_in_its_order_without_the_head(release):
    keys = [key for key in meta(release.student).state_dict() if not key.startswith("head.")]
    content = read(release.file)
    assert type(content) is dict
    assert list(content) == keys


def test_release_files_initialise_the_student(release):
    student = create_model(release.student, num_classes=100)
    missing = load_initial(student, release.file, "--initialize")
    assert all(key.startswith("head.") for key in missing)
    assert_same({key: student.state_dict()[key] for key in release.expected}, release.expected)


def test_record_says_where_the_weights_came_from(release):
    record = json.loads(release.file.with_suffix(".json").read_text())
    versions = record.pop("versions")
    assert record == {
        "file": release.file.name,
        "sha256": hashlib.sha256(release.file.read_bytes()).hexdigest(),
        "teacher": {
            "name": release.name,
            "model": release.name.removesuffix("_in21k").removesuffix("_in22k"),
            "kwargs": {},
            "source": str(release.teacher_file),
            "sha256": hashlib.sha256(release.teacher_file.read_bytes()).hexdigest(),
        },
        "student": {"name": release.student, "kwargs": {}},
        "options": {
            "layer_selection": "first_n",
            "element_selection": "uniform",
            "seed": 0,
            "exclude": [],
            "include_head": False,
            "include_head_norm": False,
            "allow_unused": False,
        },
        "normalization": IMAGES[release.architecture],
        "left_out": PAIRS[release.architecture].head,
    }
    assert versions == {"torch": torch.__version__, "timm": timm.__version__, "python": sys.version.split()[0]}


# ---------------------------------------------------------------------------------------------------------
# Teachers whose width the student's does not divide (Tables 8 and 17)


def spread(value, dim, size):
    """Evenly spaced slices along a whole dimension, as the release takes them, in exact arithmetic."""
    count = value.shape[dim]
    if count % size == 0:
        indices = range(0, count, count // size)
    else:
        indices = [(2 * i * (count - 1) + size - 1) // (2 * (size - 1)) for i in range(size)]  # rounded half up
    return value.index_select(dim, torch.tensor(indices))


@pytest.mark.parametrize(("name", "differing"), [("vit_base_patch16_224", 0), ("vit_large_patch16_224", 444)])
def test_fused_qkv_whole_gives_the_tensors_of_the_release(name, differing):
    sizes = {"depth": 2, "num_classes": 0}  # the widths are the real ones
    teacher, student = create_model(name, **sizes), create_model("vit_tiny", device="meta", **sizes)
    weights = random_weights(teacher)
    expected = {}
    for key, value in student.state_dict().items():
        expected[key] = weights[key]
        for dim, size in enumerate(value.shape):
            expected[key] = spread(expected[key], dim, size)
    assert_same(select_weights(teacher, student, weights=weights, fused_qkv="whole"), expected)

    rows = torch.arange(3 * teacher.embed_dim, dtype=torch.float32)
    weights["blocks.0.attn.qkv.bias"] = rows
    whole, parts = (
        select_weights(teacher, student, weights=weights, fused_qkv=way)["blocks.0.attn.qkv.bias"]
        for way in ("whole", "parts")
    )
    assert (whole != parts).sum() == differing


def test_fused_qkv_is_of_uniform_selection_only(cli):
    for rule in ("consecutive", "l1"):
        words = f"--model_type vit --dry_run --fused_qkv whole --element_selection {rule}"
        assert cli(select_main, *words.split()).startswith("--fused_qkv whole: has no effect with --element_selection")
