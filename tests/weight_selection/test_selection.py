"""Weight selection from end to end: the release's behaviour, consistency, positions, options, files, refusals."""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_patch_embed

from helpers import assert_same, jax_names, meta, prefixed, random_weights, read, release_names, words, written
from weight_selection import select_weights
from weight_selection.apply import apply_plan
from weight_selection.cli import main as select_main
from weight_selection.errors import InputError
from weight_selection.options import CONSISTENT, ELEMENT_SELECTION
from weight_selection.plan import make_plan
from weight_selection.sources.initial_weights import find_weights, load_initial
from weight_selection.sources.timm_models import create_model

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------------
# Small pairs of models, for all that does not depend on real sizes


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, each a name and its arguments; the file their command writes; the student's head."""

    teacher: str
    large: dict
    student: str
    small: dict
    file: str
    head: list

    def models(self, **changes):
        return meta(self.teacher, **self.large), meta(self.student, **{**self.small, **changes})

    def student_model(self):
        return create_model(self.student, **self.small)

    def command(self, output, teacher_file, *more):
        """Words of the command line; of an option given twice the last counts."""
        named = ["--pretrained_model", self.teacher, "--teacher_kwargs", *words(self.large)]
        named += ["--student", self.student, "--student_kwargs", *words(self.small)]
        return [*named, "--output_dir", output, "--pretrained_path", teacher_file, *more]


IMAGE = {"img_size": 32, "num_classes": 5}
PAIRS = {
    "vit": Pair(
        "vit_small",
        {"embed_dim": 48, "depth": 4, "num_heads": 3, **IMAGE},
        "vit_tiny",
        {"embed_dim": 24, "depth": 2, "num_heads": 3, **IMAGE},
        "vit.pth",
        ["head.weight", "head.bias"],
    ),
    "convnext": Pair(
        "convnext_tiny",
        {"depths": (2, 1, 3, 1), "dims": (8, 16, 24, 32), "num_classes": 5},
        "convnext_femto",
        {"depths": (1, 1, 2, 1), "dims": (4, 8, 12, 16), "num_classes": 5},
        "convnext.pth",
        ["head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"],
    ),
}
VIT, CONVNEXT = PAIRS["vit"], PAIRS["convnext"]


@pytest.fixture(scope="module")
def weights():
    """{family: weights of its small teacher}."""
    return {name: random_weights(pair.models()[0]) for name, pair in PAIRS.items()}


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """{family: file of its small teacher's weights}."""
    directory = tmp_path_factory.mktemp("teachers")
    for name, value in weights.items():
        torch.save(value, directory / f"{name}_teacher.pth")
    return {name: directory / f"{name}_teacher.pth" for name in weights}


@pytest.fixture(scope="module")
def selected(weights):
    """{family: what the release's rule selects for the small student}."""
    return {name: apply_plan(make_plan(*pair.models()), weights[name]) for name, pair in PAIRS.items()}


# ---------------------------------------------------------------------------------------------------------
# The two commands of the release, at real size


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
        family=request.param,
        name=name,
        student=student,
        classes=model.num_classes,
        expected=oracle(teacher),
        teacher_file=root / "teacher.pth",
        directory=root / "weight_selection",
        file=root / "weight_selection" / f"{request.param}.pth",
    )


def test_release_commands_write_the_file_named_after_the_family_and_its_record(release):
    assert release.classes == {"vit": 21843, "convnext": 21841}[release.family]
    assert written(release.directory) == [f"{release.family}.json", f"{release.family}.pth"]


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
        "left_out": PAIRS[release.family].head,
    }
    assert versions == {"torch": torch.__version__, "timm": timm.__version__, "python": sys.version.split()[0]}


# ---------------------------------------------------------------------------------------------------------
# Consistency: all tensors that share a set of neurons keep the same ones


def vit_spaces():
    """(pattern of keys, dimension, the set of neurons that this dimension indexes)."""
    return [
        (r"^(cls_token|pos_embed)$", 2, "stream"),
        (r"^patch_embed\.proj\.(weight|bias)$", 0, "stream"),
        (r"norm\d?\.(weight|bias)$", 0, "stream"),
        (r"\.qkv\.weight$", 1, "stream"),
        (r"\.attn\.proj\.(weight|bias)$", 0, "stream"),
        (r"\.fc1\.weight$", 1, "stream"),
        (r"\.fc2\.(weight|bias)$", 0, "stream"),
        (r"^head\.weight$", 1, "stream"),
        (r"\.qkv\.(weight|bias)$", 0, "attention"),
        (r"\.attn\.proj\.weight$", 1, "attention"),
        (r"\.fc1\.(weight|bias)$", 0, "hidden"),
        (r"\.fc2\.weight$", 1, "hidden"),
    ]


def convnext_spaces():
    spaces = [(r"^stem\.", 0, "stream 0"), (r"^head\.norm\.", 0, "stream 3"), (r"^head\.fc\.weight$", 1, "stream 3")]
    for stage in range(4):
        block = rf"^stages\.{stage}\.blocks\.\d+\."
        spaces += [
            (block + r"(gamma|conv_dw\.\w+|norm\.\w+|mlp\.fc2\.\w+)$", 0, f"stream {stage}"),
            (block + r"mlp\.fc1\.weight$", 1, f"stream {stage}"),
            (block + r"mlp\.fc1\.\w+$", 0, f"hidden {stage}"),
            (block + r"mlp\.fc2\.weight$", 1, f"hidden {stage}"),
            (rf"^stages\.{stage}\.downsample\.0\.", 0, f"stream {stage - 1}"),
            (rf"^stages\.{stage}\.downsample\.1\.weight$", 1, f"stream {stage - 1}"),
            (rf"^stages\.{stage}\.downsample\.1\.", 0, f"stream {stage}"),
        ]
    return spaces


SPACES = {"vit": vit_spaces(), "convnext": convnext_spaces()}
WIDTHS = {  # of the teacher; of a student that divides it and of one that does not
    "vit": (
        {"embed_dim": 384, "depth": 2, "num_heads": 6, "mlp_ratio": 2, **IMAGE},
        {"half": {"embed_dim": 192, "depth": 1, "num_heads": 3, "mlp_ratio": 2, **IMAGE}},
        {"other": {"embed_dim": 320, "depth": 1, "num_heads": 5, "mlp_ratio": 2, **IMAGE}},
    ),
    "convnext": (
        {"dims": (24, 48, 96, 192), "depths": (2, 1, 2, 1), "num_classes": 5},
        {"half": {"dims": (12, 24, 48, 96), "depths": (1, 1, 1, 1), "num_classes": 5}},
        {"other": {"dims": (16, 40, 60, 160), "depths": (1, 1, 1, 1), "num_classes": 5}},
    ),
}


def numbered(model):
    """Weights whose values say where they are: of n values each of 1..n occurs once, shuffled so that norms differ."""
    generator = torch.Generator().manual_seed(0)
    shuffled = {key: torch.randperm(value.numel(), generator=generator) for key, value in model.state_dict().items()}
    return {key: (shuffled[key] + 1.0).reshape(value.shape) for key, value in model.state_dict().items()}


def origins(source, values):
    """Where in ``source``, as ``numbered`` made it, each of ``values`` was: one tensor of indices per dimension."""
    return torch.unravel_index(source.flatten().argsort()[values.long() - 1], source.shape)


def kept_neurons(family, method, teacher, student):
    """{set of neurons: all the different choices that were made in it}, over all the tensors of a student."""
    source = numbered(teacher)
    plan = make_plan(teacher, student, include_head=True, element_selection=method)
    chosen = apply_plan(plan, source)
    found = {}
    for entry in plan.entries:
        covered = [
            (dim, space)
            for pattern, dim, space in SPACES[family]
            if re.search(pattern, entry.key) and dim < len(entry.shape)
        ]
        shrunk = {dim for dim, (t, s) in enumerate(zip(entry.teacher_shape, entry.shape, strict=True)) if t != s}
        assert shrunk == {dim for dim, _ in covered}, f"{entry.key}: the test knows {covered}"
        parts = 3 if ".qkv." in entry.key else 1
        for part, values in enumerate(chosen[entry.key].chunk(parts)):
            indices = origins(source[entry.teacher_key], values)
            for dim, space in covered:
                lines = indices[dim].movedim(dim, 0).reshape(values.shape[dim], -1)
                assert (lines == lines[:, :1]).all(), f"{entry.key}: another choice in every row"
                first = part * entry.teacher_shape[0] // parts if dim == 0 else 0
                found.setdefault(space, set()).add(tuple((lines[:, 0] - first).tolist()))
    return found


def widths(family, which):
    large, half, other = WIDTHS[family]
    pair = PAIRS[family]
    return meta(pair.teacher, **large), meta(pair.student, **{**half, **other}[which])


@pytest.mark.parametrize("which", ["half", "other"])
@pytest.mark.parametrize("method", ["uniform", "consecutive", "random"])
@pytest.mark.parametrize("family", PAIRS)
def test_consistent_rules_keep_the_same_neurons_everywhere(family, method, which):
    for space, choices in kept_neurons(family, method, *widths(family, which)).items():
        assert len(choices) == 1, space
        assert min(next(iter(choices))) >= 0


@pytest.mark.parametrize("method", ["random_inconsistent", "l1"])
@pytest.mark.parametrize("family", PAIRS)
def test_inconsistent_rules_choose_anew_in_every_tensor(family, method):
    for space, choices in kept_neurons(family, method, *widths(family, "half")).items():
        assert len(choices) > 1, space


def test_stream_of_a_width_that_does_not_divide_is_the_rounded_grid():
    kept = kept_neurons("vit", "uniform", *widths("vit", "other"))["stream"]
    assert kept == {tuple(torch.linspace(0, 383, 320, dtype=torch.float64).round().int().tolist())}


@pytest.mark.parametrize("method", ELEMENT_SELECTION)
def test_query_key_and_value_are_each_selected_inside_their_own_part(method):
    teacher, student = VIT.models()
    source = numbered(teacher)
    chosen = apply_plan(make_plan(teacher, student, element_selection=method), source)
    for key in ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.bias"):
        rows = origins(source[key], chosen[key])[0]
        for part, found in enumerate(rows.chunk(3)):
            assert ((found >= 48 * part) & (found < 48 * (part + 1))).all(), f"{key}: part {part}"


def test_random_inconsistent_draws_anew_for_query_key_and_value():
    teacher, student = VIT.models()
    source = numbered(teacher)
    chosen = apply_plan(make_plan(teacher, student, element_selection="random_inconsistent"), source)
    rows = origins(source["blocks.0.attn.qkv.bias"], chosen["blocks.0.attn.qkv.bias"])[0]
    assert len({tuple((rows.chunk(3)[part] - 48 * part).tolist()) for part in range(3)}) == 3


@pytest.mark.parametrize("method", ["uniform", "random"])
def test_attention_pooling_keeps_the_neurons_of_the_stream_and_parts_keys_from_values(method):
    sizes = {"depth": 1, "num_heads": 3, "img_size": 32}
    teacher = meta("vit_base_patch16_siglip_224", embed_dim=48, **sizes)
    source = numbered(teacher)
    plan = make_plan(teacher, meta("vit_base_patch16_siglip_224", embed_dim=24, **sizes), element_selection=method)
    chosen = apply_plan(plan, source)
    places = {key: origins(source[key], value) for key, value in chosen.items()}
    stream = places["norm.bias"][0]
    assert torch.equal(places["attn_pool.latent"][2].flatten(), stream)
    keys, values = places["attn_pool.kv.bias"][0].chunk(2)
    assert torch.equal(keys, stream)
    assert torch.equal(values - 48, stream)


@pytest.mark.parametrize("family", PAIRS)
def test_a_student_as_large_as_its_teacher_computes_the_same(family):
    pair = PAIRS[family]
    teacher = create_model(pair.teacher, **pair.large).eval()
    student = create_model(pair.teacher, **pair.large).eval()
    student.load_state_dict(select_weights(teacher, student), strict=False)
    student.head.load_state_dict(teacher.head.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(student(images), teacher(images))


@pytest.mark.parametrize("method", ELEMENT_SELECTION)
def test_selected_weights_are_copies(method):
    # Training the student in place must not change the teacher that distils into it.
    model = create_model(VIT.student, **VIT.small)
    for value in select_weights(model, model, element_selection=method).values():
        value.fill_(7)
    assert not any((value == 7).any() for value in model.state_dict().values())


def test_a_student_can_be_given_by_name():
    chosen = select_weights(create_model("vit_small", num_classes=5), "vit_tiny")
    student = meta("vit_tiny").state_dict()
    assert {key: value.shape for key, value in chosen.items()} == {
        key: value.shape for key, value in student.items() if not key.startswith("head.")
    }


# ---------------------------------------------------------------------------------------------------------
# Positions are resampled, tokens are matched


def test_positions_of_a_larger_image_are_resampled_and_the_class_tokens_kept():
    teacher, student = meta(VIT.teacher, **{**VIT.large, "img_size": 96}), VIT.models()[1]
    source = random_weights(teacher)
    rows = torch.arange(6.0).repeat_interleave(6)  # a 6 x 6 grid on which every neuron knows its row
    source["pos_embed"][0, 1:] = rows[:, None]
    chosen = apply_plan(make_plan(teacher, student), source)["pos_embed"]
    assert torch.equal(chosen[:, 0], source["pos_embed"][:, 0, ::2])
    grid = chosen[0, 1:].reshape(2, 2, 24)
    torch.testing.assert_close(grid[:, :1].expand_as(grid), grid)  # of one value along each row
    torch.testing.assert_close(grid.mean(), torch.tensor(2.5))
    # Subsampling the tokens would give rows of the top left corner: 0 and 1, or 0 and 3.
    assert 0.5 < grid[0].mean() < 1.5
    assert 3.5 < grid[1].mean() < 4.5


def test_patch_kernels_of_another_size_are_resampled():
    teacher = meta("vit_small_patch32_224", **{**VIT.large, "img_size": 64})
    source = random_weights(teacher)
    chosen = apply_plan(make_plan(teacher, VIT.models()[1]), source)
    expected = resample_patch_embed(source["patch_embed.proj.weight"][::2], [16, 16])
    torch.testing.assert_close(chosen["patch_embed.proj.weight"], expected)
    assert torch.equal(chosen["pos_embed"], source["pos_embed"][:, :, ::2])  # both have 2 x 2 patches


def test_distilled_teacher_is_refused_unless_its_token_may_go():
    teacher, student = meta("deit_small_distilled_patch16_224", **VIT.large), VIT.models()[1]
    with pytest.raises(InputError, match=r"dist_token.*--allow_unused"):
        make_plan(teacher, student)
    source = random_weights(teacher)
    chosen = apply_plan(make_plan(teacher, student, allow_unused=True), source)["pos_embed"]
    assert torch.equal(chosen, source["pos_embed"][:, [0, 2, 3, 4, 5], ::2])  # 1 is the distillation token's


def test_position_of_the_class_token_is_lost_only_on_request():
    teacher, student = VIT.models(no_embed_class=True)
    with pytest.raises(InputError, match=r"pos_embed.* 1 prefix tokens, student's 0.*--allow_unused"):
        make_plan(teacher, student)
    source = random_weights(teacher)
    chosen = apply_plan(make_plan(teacher, student, allow_unused=True), source)["pos_embed"]
    assert torch.equal(chosen, source["pos_embed"][:, 1:, ::2])


def test_deit3_teacher_needs_a_student_with_its_layer_scale_and_positions():
    teacher = meta("deit3_small_patch16_224", **VIT.large)
    with pytest.raises(InputError, match=r"blocks\.0\.ls1\.gamma.*--student_kwargs"):
        make_plan(teacher, VIT.models()[1])
    with pytest.raises(InputError, match=r"pos_embed.* 0 prefix tokens, student's 1.*--student_kwargs"):
        make_plan(teacher, VIT.models(init_values=1e-6)[1])
    student = VIT.models(init_values=1e-6, no_embed_class=True)[1]
    source = random_weights(teacher)
    chosen = apply_plan(make_plan(teacher, student), source)
    assert torch.equal(chosen["pos_embed"], source["pos_embed"][:, :, ::2])
    assert torch.equal(chosen["blocks.1.ls2.gamma"], source["blocks.1.ls2.gamma"][::2])


def test_clip_teacher_needs_a_student_that_normalises_first():
    plan = make_plan(meta("vit_base_clip"), meta("vit_tiny_clip"))
    assert [entry.key for entry in plan.entries if entry.role != "selected"] == ["head.weight", "head.bias"]
    assert {entry.teacher_key for entry in plan.entries if "norm_pre" in entry.key} == {
        "norm_pre.weight",
        "norm_pre.bias",
    }
    with pytest.raises(InputError, match=r"norm_pre\.weight"):
        make_plan(meta("vit_base_clip"), meta("vit_tiny"))


@pytest.mark.parametrize("student", ["convnext_atto", "convnext_femto.d1_in1k"])
def test_students_with_1x1_convolutions_get_the_values_of_linear_layers(student):
    teacher = meta(CONVNEXT.teacher, **CONVNEXT.large)
    source = random_weights(teacher)
    linear = apply_plan(make_plan(teacher, meta(student, **CONVNEXT.small, conv_mlp=False)), source)
    convolution = meta(student, **CONVNEXT.small, conv_mlp=True)
    chosen = apply_plan(make_plan(teacher, convolution), source)
    assert {key: value.shape for key, value in chosen.items()} == {
        key: value.shape for key, value in convolution.state_dict().items() if not key.startswith("head.")
    }
    assert chosen["stages.0.blocks.0.mlp.fc1.weight"].shape == (16, 4, 1, 1)
    assert_same({key: value.reshape(linear[key].shape) for key, value in chosen.items()}, linear)


def test_students_with_linear_layers_get_the_values_of_1x1_convolutions():
    teacher, student = meta("convnext_nano", **CONVNEXT.large), CONVNEXT.models()[1]
    source = random_weights(teacher)
    chosen = apply_plan(make_plan(teacher, student), source)["stages.1.blocks.0.mlp.fc2.weight"]
    assert torch.equal(chosen, source["stages.1.blocks.0.mlp.fc2.weight"][::2, ::2, 0, 0])


def test_kernels_for_colours_are_adapted_to_other_channels():
    teacher = create_model(VIT.teacher, **VIT.large)
    kernel = "patch_embed.proj.weight"
    grey = select_weights(teacher, VIT.models(in_chans=1)[1])[kernel]
    torch.testing.assert_close(grey, teacher.state_dict()[kernel][::2].sum(1, keepdim=True))
    assert select_weights(teacher, VIT.models(in_chans=4)[1])[kernel].shape == (24, 4, 16, 16)


def test_kernels_for_grey_images_are_not_made_for_colours(cli, tmp_path):
    grey = VIT.large | {"in_chans": 1}
    torch.save(random_weights(meta(VIT.teacher, **grey)), tmp_path / "grey.pth")
    command = [*VIT.command(tmp_path / "out", tmp_path / "grey.pth"), "--teacher_kwargs", *words(grey)]
    assert "patch_embed.proj.weight, dimension 1: teacher's images have 1 channels" in cli(select_main, *command)
    assert cli(select_main, *command, "--student_kwargs", *words(VIT.small), "in_chans=1") is None
    assert read(tmp_path / "out" / "vit.pth")["patch_embed.proj.weight"].shape == (24, 1, 16, 16)


# ---------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("rule", "layers"),
    [("first_n", range(6)), ("mid_n", range(3, 9)), ("last_n", range(6, 12)), ("uniform", range(0, 12, 2))],
)
def test_layer_selection_for_the_shallow_student_of_the_paper(rule, layers):
    plan = make_plan(meta("vit_small"), meta("vit_a"), layer_selection=rule)
    moved = [(entry.key, entry.teacher_key) for entry in plan.entries if entry.key.startswith("blocks.")]
    assert len(moved) == 6 * 12
    for key, source in moved:
        _, layer, name = key.split(".", 2)
        assert source == f"blocks.{layers[int(layer)]}.{name}"


def test_layer_selection_is_made_in_every_stage():
    plan = make_plan(meta("convnext_tiny"), meta("convnext_femto"), layer_selection="last_n")
    sources = {entry.key: entry.teacher_key for entry in plan.entries}
    layers = [sources[f"stages.{stage}.blocks.0.gamma"] for stage in range(4)]
    assert layers == [f"stages.{stage}.blocks.{first}.gamma" for stage, first in enumerate((1, 1, 3, 1))]
    assert sources["stages.2.downsample.1.weight"] == "stages.2.downsample.1.weight"


def test_layers_of_the_command_line_are_those_of_the_file(cli, files, weights, tmp_path):
    command = VIT.command(tmp_path, files["vit"], "--layer_selection", "last_n")
    assert cli(select_main, *command) is None
    norm = read(tmp_path / "vit.pth")["blocks.0.norm1.weight"]
    assert torch.equal(norm, weights["vit"]["blocks.2.norm1.weight"][::2])


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


@pytest.mark.parametrize(("family", "component"), EXCLUDED)
def test_excluded_components_are_absent_and_the_record_lets_the_file_load(
    family, component, cli, files, selected, tmp_path
):
    pair = PAIRS[family]
    command = pair.command(tmp_path, files[family], "--exclude", component)
    assert cli(select_main, *command) is None
    path = tmp_path / pair.file
    expected = {key: value for key, value in selected[family].items() if not EXCLUDED[family, component](key)}
    absent = [key for key in pair.models()[1].state_dict() if key not in expected]
    assert len(expected) < len(selected[family])
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
@pytest.mark.parametrize("family", PAIRS)
def test_every_element_rule_gives_a_file_the_student_loads(family, method, cli, files, tmp_path):
    pair = PAIRS[family]
    command = pair.command(tmp_path, files[family], "--element_selection", method)
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


@pytest.mark.parametrize("method", CONSISTENT)
def test_the_plan_holds_the_kept_neurons_of_every_group_and_all_its_tensors_keep_them(method):
    teacher, student = VIT.models()
    source = numbered(teacher)
    plan = make_plan(teacher, student, element_selection=method, seed=3)
    chosen = apply_plan(plan, source)
    stream = next(group for group in plan.groups.values() if "norm.bias" in group.keys)
    assert stream.teacher.size == 48 and len(stream.kept) == 24
    for key in ("norm.bias", "blocks.0.norm1.weight", "blocks.1.mlp.fc2.bias"):
        assert key in stream.keys
        assert origins(source[key], chosen[key])[0].tolist() == stream.kept.tolist()


@pytest.mark.parametrize("method", ["l1", "magnitude", "random_inconsistent"])
def test_rules_that_choose_per_tensor_keep_nothing_in_a_group(method):
    plan = make_plan(*VIT.models(), element_selection=method)
    assert all(group.kept is None for group in plan.groups.values())


def test_existing_files_are_kept_unless_told_otherwise(cli, files, selected, tmp_path):
    path = tmp_path / "vit.pth"
    path.write_text("precious")
    message = cli(select_main, *VIT.command(tmp_path, files["vit"]))
    assert f"--output_dir {tmp_path}" in message
    assert "--overwrite" in message
    assert path.read_text() == "precious"
    assert cli(select_main, *VIT.command(tmp_path, files["vit"], "--overwrite")) is None
    assert_same(read(path), selected["vit"])


# ---------------------------------------------------------------------------------------------------------
# Teacher files


TEACHER_FILES = {
    "nested under model, beside plain values": ("x.pth", lambda w: {"model": w, "epoch": 3, "args": {"lr": 0.1}}),
    "nested under state_dict": ("x.pth.tar", lambda w: {"state_dict": w}),
    "our checkpoint without averaged weights": ("x.pth", lambda w: {"model": w, "model_ema": None, "optimizer": {}}),
    "averaged weights before others": ("x.pth", lambda w: {"model": {"a": torch.zeros(1)}, "model_ema": w}),
    "DDP": ("x.bin", lambda w: {"model": prefixed("module.", w)}),
    "torch.compile": ("x.pt", lambda w: prefixed("_orig_mod.", w)),
    "without a classifier": ("x.pth", lambda w: {key: v for key, v in w.items() if not key.startswith("head.")}),
    "other classes": ("x.pth", lambda w: {k: v[:3] if k in VIT.head + CONVNEXT.head[2:] else v for k, v in w.items()}),
    "safetensors": ("x.safetensors", lambda w: w),
    "safetensors of DDP": ("x.safetensors", lambda w: prefixed("module.", w)),
}


@pytest.mark.parametrize("layout", TEACHER_FILES)
@pytest.mark.parametrize("family", PAIRS)
def test_teacher_files_of_every_layout_give_the_same_student(family, layout, cli, weights, selected, tmp_path):
    name, convert = TEACHER_FILES[layout]
    save = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
    save(convert(weights[family]), tmp_path / name)
    assert cli(select_main, *PAIRS[family].command(tmp_path / "out", tmp_path / name)) is None
    assert_same(read(tmp_path / "out" / PAIRS[family].file), selected[family])


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


@pytest.mark.parametrize("family", PAIRS)
def test_selected_weights_can_be_selected_from_again(family, cli, files, selected, tmp_path):
    pair = PAIRS[family]
    assert cli(select_main, *pair.command(tmp_path, files[family])) is None
    kwargs = ["--pretrained_model", pair.student, "--teacher_kwargs", *words(pair.small)]
    assert cli(select_main, *pair.command(tmp_path / "2", tmp_path / pair.file, *kwargs)) is None
    assert_same(read(tmp_path / "2" / pair.file), selected[family])


def program(*words, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "weight_selection.py", *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_published_weights_come_from_the_cache_of_the_hub(tmp_path):
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
    done = program(*command, "--student_kwargs", *words(VIT.small), HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same(read(tmp_path / "out" / "vit.pth"), apply_plan(make_plan(teacher, VIT.models()[1]), weights))
    assert json.loads((tmp_path / "out" / "vit.json").read_text())["teacher"] == {
        "name": "vit_small_patch16_224_in21k",
        "model": "vit_small_patch16_224.augreg_in21k",
        "kwargs": kwargs,
        "source": "timm/vit_small_patch16_224.augreg_in21k",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


# ---------------------------------------------------------------------------------------------------------
# Refusals


def test_program_refuses_with_one_line_and_status_2(tmp_path):
    name = "vit_small_patch16_224_in21k"
    named = ["--model_type", "vit", "--pretrained_model", name, "--output_dir", tmp_path / "out"]
    done = program(*named, HF_HUB_CACHE=str(tmp_path / "empty"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"weight_selection.py: error: --pretrained_model {name}: ")
    assert "--pretrained_path" in done.stderr
    assert written(tmp_path) == []


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
    "other family": (
        "vit",
        ["--student", "convnext_femto", "--student_kwargs", *words(CONVNEXT.small)],
        ["teacher is a vit model", "convnext"],
    ),
    "other model type": ("vit", ["--model_type", "convnext"], ["--model_type convnext", "--student vit_tiny"]),
    "undeclared family": ("vit", ["--student", "resnet18", "--student_kwargs"], ["a vit model", "resnet"]),
    "seed without effect": ("vit", ["--seed", "3"], ["--seed 3", "uniform"]),
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
    "misspelt argument": ("vit", ["--teacher_kwargs", "depht=4"], ["--pretrained_model vit_small", "depht"]),
    "argument of ours": ("vit", ["--student_kwargs", *words(VIT.small), "device=cpu"], ["--student", "device"]),
    "too few stages": ("convnext", ["--student_kwargs", "depths=(1,1)"], ["--student convnext_femto", "depths=(1, 1)"]),
    "unknown rule": ("vit", ["--element_selection", "unifrom"], ["--element_selection", "unifrom", "uniform"]),
    "abbreviation": ("vit", ["--dry"], ["--dry"]),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_options_that_cannot_work_are_refused_before_anything_is_written(case, cli, files, tmp_path):
    family, more, named = REFUSED_OPTIONS[case]
    message = cli(select_main, *PAIRS[family].command(tmp_path, files[family], *more))
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


@pytest.mark.parametrize(("family", "other"), [("convnext", "vit"), ("vit", "convnext")])
def test_teacher_files_of_another_family_are_refused(family, other, cli, files, tmp_path):
    message = cli(select_main, *PAIRS[family].command(tmp_path, files[other]))
    assert message is not None
    assert f"--pretrained_path {files[other]}: " in message
    assert written(tmp_path) == []


def test_a_refused_teacher_does_not_cost_the_file_that_was_there(cli, files, broken, selected, tmp_path):
    assert cli(select_main, *VIT.command(tmp_path, files["vit"])) is None
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert cli(select_main, *VIT.command(tmp_path, broken / "nan.pth", "--overwrite")) is not None
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("below", ["folder.pth", "regular/file/init.pth", "regular", "regular/directory"])
def test_outputs_that_cannot_be_written_are_refused(below, cli, files, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "regular").write_text("not a directory")
    message = cli(select_main, *VIT.command(tmp_path / below, files["vit"], "--overwrite"))
    assert message is not None
    assert f"--output_dir {tmp_path}" in message
    assert written(tmp_path) == ["regular"]
    assert (tmp_path / "regular").read_text() == "not a directory"


@pytest.mark.parametrize("name", ["vit_small_resnet26d_224", "vit_base_patch16_siglip_224"])
def test_models_that_are_not_all_neurons_are_refused_or_selected_but_never_crash(name):
    # Batch statistics have a counter without any dimension; attention pooling has keys and values stacked.
    teacher = create_model(name, embed_dim=48, depth=1, num_heads=3, num_classes=5)
    student = meta(name, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    try:
        chosen = select_weights(teacher, student)
    except InputError:
        return
    assert {key: value.shape for key, value in chosen.items()} == {
        key: value.shape for key, value in student.state_dict().items() if not key.startswith("head.")
    }


# ---------------------------------------------------------------------------------------------------------
# A family that is declared nowhere


RESNET = Pair(
    "resnet18",
    {"channels": (16, 32, 48, 64), "layers": (2, 2, 3, 1), "num_classes": 5},
    "resnet18",
    {"channels": (8, 16, 24, 32), "layers": (1, 2, 2, 1), "num_classes": 5},
    "resnet.pth",
    ["fc.weight", "fc.bias"],
)


def test_any_family_goes_from_a_file_to_a_file_that_initialises(cli, tmp_path, capsys):
    teacher = create_model(RESNET.teacher, **RESNET.large)
    teacher.train()(torch.rand(2, 3, 64, 64))  # moves the running statistics
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    assert cli(select_main, *RESNET.command(tmp_path / "out", tmp_path / "teacher.pth")) is None
    assert written(tmp_path / "out") == ["resnet.json", "resnet.pth"]
    chosen = read(tmp_path / "out" / "resnet.pth")
    assert_same(chosen, select_weights(teacher, RESNET.student_model()))
    key = "layer1.0.bn1.running_mean"
    assert torch.equal(chosen[key], teacher.state_dict()[key][::2])
    assert chosen["layer1.0.bn1.num_batches_tracked"] == 1
    student = RESNET.student_model()
    file = find_weights(tmp_path / "out", student, "--initialize")
    assert load_initial(student, file, "--initialize") == RESNET.head


@pytest.mark.parametrize(
    ("component", "inside"),
    [("norm", "bn|downsample.1"), ("patch_embed", "^conv1"), ("mlp", None), ("pos_embed", None)],
)
def test_components_of_any_family_can_be_excluded(component, inside, cli, tmp_path):
    torch.save(create_model(RESNET.teacher, **RESNET.large).state_dict(), tmp_path / "teacher.pth")
    command = RESNET.command(tmp_path / "out.pth", tmp_path / "teacher.pth", "--exclude", component)
    message = cli(select_main, *command)
    if inside is None:
        assert message == f"--exclude {component}: resnet has no such component; it has norm, patch_embed"
        return
    assert message is None
    keys = [key for key in RESNET.student_model().state_dict() if key not in RESNET.head]
    assert list(read(tmp_path / "out.pth")) == [key for key in keys if not re.search(inside, key)]


# ---------------------------------------------------------------------------------------------------------
# From Python, and to others


def test_the_teachers_weights_can_be_given_apart_from_it(weights, files, selected):
    teacher, student = VIT.models()  # on the meta device
    assert_same(select_weights(teacher, student, weights=weights["vit"]), selected["vit"])
    assert_same(select_weights(teacher, student, weights=files["vit"]), selected["vit"])
    assert_same(select_weights(teacher, student, weights=str(files["vit"])), selected["vit"])


def test_a_teacher_can_be_a_name_with_a_file(tmp_path):
    student = {"embed_dim": 32, "num_heads": 2, "num_classes": 5}
    teacher = create_model("test_vit")
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    small = meta("test_vit", **student)
    assert_same(select_weights("test_vit", small, weights=tmp_path / "teacher.pth"), select_weights(teacher, small))


def test_weights_that_are_not_the_teachers_are_refused(weights, files):
    teacher, student = VIT.models()
    with pytest.raises(InputError, match=r"weights: cls_token is absent, \(1, 1, 48\) is needed"):
        select_weights(teacher, student, weights=weights["convnext"])
    with pytest.raises(InputError, match=f"weights {files['convnext']}"):
        select_weights(teacher, student, weights=files["convnext"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_loads_the_file_into_a_model_of_other_classes(suffix, cli, files, selected, tmp_path):
    path = tmp_path / f"init{suffix}"
    assert cli(select_main, *VIT.command(path, files["vit"])) is None
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **VIT.small
    )
    state = model.state_dict()
    assert_same({key: state[key] for key in selected["vit"]}, selected["vit"])


def test_timm_loads_a_complete_file_as_a_checkpoint(cli, files, selected, tmp_path):
    command = VIT.command(tmp_path / "init.safetensors", files["vit"], "--complete", "--seed", "3")
    assert cli(select_main, *command) is None
    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "init.safetensors"), **VIT.small)
    torch.manual_seed(3)
    expected = create_model("vit_tiny", **VIT.small).state_dict() | selected["vit"]
    assert_same(dict(model.state_dict()), dict(expected))
    record = json.loads((tmp_path / "init.json").read_text())
    assert (record["left_out"], record["random"]) == ([], VIT.head)
    assert load_initial(model, tmp_path / "init.safetensors", "--initialize") == []


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


# ---------------------------------------------------------------------------------------------------------
# Loading an initial file into a student


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("vit", lambda w: {**w, "norm.weight": torch.zeros(25)}, r"norm\.weight is \(25,\), the model's is \(24,\)"),
        ("vit", lambda w: {key: v for key, v in w.items() if key != "pos_embed"}, "pos_embed is missing"),
        ("vit", lambda w: {**w, "blocks.2.norm1.bias": torch.zeros(24)}, r"blocks\.2\.norm1\.bias is not a key"),
        ("vit", lambda w: {**w, "head.weight": torch.zeros(7, 24)}, r"head\.weight is \(7, 24\)"),
        ("convnext", lambda w: {**w, "stem.0.bias": torch.zeros(5)}, r"stem\.0\.bias is \(5,\)"),
    ],
)
def test_initial_files_must_fit_the_student(family, change, named, selected, tmp_path):
    student = PAIRS[family].student_model()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    torch.save(change(selected[family]), tmp_path / "x.pth")
    with pytest.raises(InputError, match=f"--initialize {re.escape(str(tmp_path / 'x.pth'))}: .*{named}"):
        load_initial(student, tmp_path / "x.pth", "--initialize")
    assert_same(student.state_dict(), before)


@pytest.mark.parametrize(("family", "first"), [("vit", "cls_token"), ("convnext", r"stem\.0\.weight")])
def test_initial_files_of_another_family_are_refused(family, first, selected, tmp_path):
    other = "convnext" if family == "vit" else "vit"
    torch.save(selected[other], tmp_path / "x.pth")
    with pytest.raises(InputError, match=f"{first} is missing"):
        load_initial(PAIRS[family].student_model(), tmp_path / "x.pth", "--initialize")


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
