"""Projection: what it gives back exactly, and how near to its teacher it brings a student."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn as nn
from timm.layers import StdConv2d

from architectures import MODELS, lively, models, reads
from helpers import images_for, random
from proofs import structures_of_pair
from traces import structure_of
from weight_selection import select_weights
from weight_selection.apply import apply_plan
from weight_selection.errors import InputError
from weight_selection.modules import copy_of
from weight_selection.options import SelectionOptions
from weight_selection.plan import plan_selection
from weight_selection.projection import equations
from weight_selection.projection.project import project
from weight_selection.projection.symmetries import HEADS, Symmetries
from weight_selection.projection.symmetry_check import check_streams
from weight_selection.projection.traced_model import TracedModel
from weight_selection.sources.timm_models import create_model

DOUBLE = torch.float64

STREAMS = (
    "vit",
    "vit_qk_norm",
    "deit3",
    "dinov2_reg",
    "dinov2_swiglu",
    "siglip",
    "eva",
    "beit",
    "cait",
    "efficientvit",
    "dinov3",
    "eva02",
)
SMALL_IMAGES = {name: 32 for name in MODELS if "img_size" not in MODELS[name][1]}


@cache
def traced_model(name):
    """A small model with random values, traced, and images that it takes."""
    model = lively(models(name)[1])
    return TracedModel.of(model, structures_of_pair(name)[1]), images_for(model, 3, SMALL_IMAGES.get(name))


def first_weights(plan, teacher, student, images, method):
    """A student's first weights, from copies of models that are traced already."""
    teacher, student = (TracedModel.of(copy_of(traced.model), traced.structure) for traced in (teacher, student))
    return project(plan.selected, teacher, student, images.split(16), method)


def projected(teacher, student, images, method):
    """A copy of the student's model with the weights that projection gives it."""
    plan = plan_selection(teacher.structure, student.structure, SelectionOptions(include_head=True))
    first = first_weights(plan, teacher, student, images, method)
    found = copy_of(student.model)
    for parameter in found.parameters():
        parameter.data += 1
    found.load_state_dict(first, strict=False)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["project", "greedy"])
def test_a_student_as_large_as_its_teacher_has_its_function(name, method):
    teacher, images = traced_model(name)
    if method == "project" and not teacher.symmetries.rotated():
        with pytest.raises(InputError, match="choose greedy"):
            check_streams(teacher.symmetries, name)
        return
    try:
        student = projected(teacher, teacher, images, method)
    except InputError as error:
        assert method == "project" and "computes something else when its residual stream is rotated" in str(error)
        assert name not in STREAMS
        return
    assert method == "greedy" or name in (*STREAMS, "swin", "swin_v2")
    with torch.no_grad():
        expected = teacher.model(images)
        assert expected.std() > 1e-3
        torch.testing.assert_close(student(images), expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


def disguised(plan, teacher, whole, student):
    """A teacher's state_dict that computes what the student does with more neurons of each kind.

    Beside every neuron of the student's are copies that nobody reads, so a normalisation sees the same statistics;
    whole heads are copied, for whom none writes. Layers that the plan drops are zero.

    Args:
        whole: the teacher's structure.
    """
    symmetries = Symmetries(teacher, whole.neurons)
    state = {key: torch.zeros_like(value) for key, value in teacher.state_dict().items()}
    weights = student.state_dict()
    for entry in plan.entries:
        value = weights[entry.key]
        for dim, size in enumerate(entry.teacher_shape):
            origin, alive = np.arange(size), np.ones(size, bool)
            groups = [part.group for part in whole.neurons.slices[entry.teacher_key][dim] or ()]
            for pair, group in zip(entry.slices.get(dim, ()), groups, strict=False):
                theirs, ours = pair.teacher, pair.student
                times = [t // s for t, s in zip(theirs.shape, ours.shape, strict=True)]
                axes = [np.arange(t) for t in theirs.shape]
                if symmetries.treatment(group, False) == HEADS:
                    places = [axis % s for axis, s in zip(axes, ours.shape, strict=True)]
                    first = [axis < s for axis, s in zip(axes, ours.shape, strict=True)]
                else:
                    places = [axis // n for axis, n in zip(axes, times, strict=True)]
                    first = [axis % n == 0 for axis, n in zip(axes, times, strict=True)]
                origin[theirs] = ours[np.ix_(*places)]
                alive[theirs] = np.all(np.meshgrid(*first, indexing="ij"), axis=0)
            value = value.index_select(dim, torch.from_numpy(origin))
            if dim == reads(teacher, entry.teacher_key):
                value = value * torch.from_numpy(alive).view([-1 if d == dim else 1 for d in range(value.ndim)])
        state[entry.teacher_key] = value
    return state


RECOVERED = {
    "greedy": ("vit", "vit_qk_norm", "deit3", "dinov2_reg", "dinov2_swiglu", "dinov3", "eva", "convnext", "convnext_v2")
    + ("mixer", "gmixer", "resnet", "wide_resnet", "resnext", "metaformer", "convmixer"),
    "project": ("vit", "vit_qk_norm", "deit3", "dinov2_reg", "dinov2_swiglu", "dinov3", "eva"),
}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in RECOVERED for name in RECOVERED[method]])
def test_a_teacher_that_uses_only_a_part_of_its_neurons_is_recovered(method, name, monkeypatch):
    monkeypatch.setattr(equations, "RIDGE", 1e-11)
    teacher, student = models(name)
    for model in (teacher, lively(student)):
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-12  # a part of the variance of another size
    whole, small = structures_of_pair(name)
    plan = plan_selection(whole, small, SelectionOptions(include_head=True))
    teacher.double().eval().load_state_dict(disguised(plan, teacher, whole, student))
    images = images_for(student, 24, SMALL_IMAGES.get(name))
    with torch.no_grad():
        expected = student(images)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-9, atol=1e-9)
        found = projected(TracedModel.of(teacher, whole), TracedModel.of(student, small), images, method)
        error = (found(images) - expected).norm() / expected.norm()
    assert error < 1e-6, error


def orthogonal_to_ones(size, count, seed):
    columns = random(size, count + 1, seed=seed)
    columns[:, 0] = 1
    return torch.linalg.qr(columns).Q[:, 1:]


def oblique(student, teacher):
    """A teacher's state_dict that computes what the student does, with its stream along no coordinates of its own.

    x = V s, so that n = sqrt(D/d) V LN(s); heads have dimensions more that are zero.
    """
    d, large = student.embed_dim, teacher.embed_dim
    turn = orthogonal_to_ones(large, d - 1, 5) @ orthogonal_to_ones(d, d - 1, 6).T
    into = turn.T * (d / large) ** 0.5
    heads, a, b = 2, large // 2, d // 2
    inside = torch.cat([torch.arange(b) + head * a for head in range(heads)])
    state = {key: torch.zeros_like(value) for key, value in teacher.state_dict().items()}
    given = student.state_dict()
    norms = {"attn.qkv": "norm1", "mlp.fc1": "norm2", "head": "norm"}
    for key, value in given.items():
        layer, _, kind = key.rpartition(".")
        norm = next((layer.removesuffix(end) + norms[end] for end in norms if layer.endswith(end)), None)
        if "norm" in layer:
            value = torch.ones(large) if kind == "weight" else torch.zeros(large)
        elif norm is not None:
            gain, shift = given[f"{norm}.weight"], given[f"{norm}.bias"]
            weight = given[f"{layer}.weight"]
            value = weight * gain @ into if kind == "weight" else value + weight @ shift
        elif layer.endswith(("attn.proj", "mlp.fc2", "patch_embed.proj")):
            value = torch.tensordot(turn, value, 1)
        else:
            value = value @ turn.T
        if layer.endswith("attn.qkv"):
            wide = torch.zeros(3, large, *value.shape[1:], dtype=DOUBLE)
            wide[:, inside] = value.view(3, d, *value.shape[1:])
            wide[0] *= (a / b) ** 0.5
            value = wide.flatten(0, 1)
        if layer.endswith("attn.proj") and kind == "weight":
            wide = torch.zeros(large, large, dtype=DOUBLE)
            wide[:, inside] = value
            value = wide
        state[key] = value
    return state


def test_a_stream_along_no_coordinates_is_recovered_by_a_rotation_only(monkeypatch):
    monkeypatch.setattr(equations, "RIDGE", 1e-11)
    options = {"img_size": 32, "patch_size": 8, "num_classes": 7, "num_heads": 2, "depth": 2}
    student = lively(create_model("vit_tiny", **options, embed_dim=32))
    teacher = lively(create_model("vit_tiny", **options, embed_dim=64, mlp_ratio=2))
    for module in (*teacher.modules(), *student.modules()):
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    teacher.load_state_dict(oblique(student, teacher))
    images = images_for(student, 24)
    errors = {}
    with torch.no_grad():
        expected = student(images)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-8, atol=1e-8)
        for method, seen in (("project", images), ("greedy", images_for(student, 48)[24:])):  # fitted, greedy is exact
            first = select_weights(teacher, student, element_selection=method, calibration=images, include_head=True)
            found = lively(copy.deepcopy(student))
            found.load_state_dict(first, strict=False)
            errors[method] = ((found(seen) - student(seen)).norm() / student(seen).norm()).item()
    assert errors["project"] < 1e-6 and errors["greedy"] > 1e-2, errors


def test_heads_of_a_low_rank_are_recovered_in_smaller_and_in_more_heads(monkeypatch):
    monkeypatch.setattr(equations, "RIDGE", 1e-11)
    options = {"img_size": 32, "patch_size": 8, "num_classes": 7, "depth": 2, "embed_dim": 32}
    teacher = lively(create_model("vit_tiny", **options, num_heads=2))
    for block in teacher.blocks:  # queries and keys that share 8 of 16 dimensions
        rows = block.attn.qkv.weight.data.view(3, 2, 16, 32)
        rows[0, :, 8:] = random(2, 8, 8) @ rows[0, :, :8]
        bias = block.attn.qkv.bias.data.view(3, 2, 16)
        bias[0, :, 8:] = (random(2, 8, 8) @ bias[0, :, :8, None])[..., 0]
    student = lively(create_model("vit_tiny", **options, num_heads=4))  # the values of each go into two heads
    images = images_for(student, 24)
    student.load_state_dict(
        select_weights(teacher, student, element_selection="greedy", calibration=images, include_head=True)
    )
    with torch.no_grad():
        torch.testing.assert_close(student(images), teacher(images), rtol=1e-6, atol=1e-6)


ODD = {  # what the models above do not have: (arguments of both, of the teacher, of the student)
    "resnetv2_50": (
        {"layers": (1, 1, 1, 1), "conv_layer": StdConv2d},
        {"channels": (64,) * 4},
        {"channels": (32,) * 4},
    ),
    "test_nfnet": ({}, {}, {}),  # products of parameters and numbers
    "swinv2_cr_tiny_224": (
        {"img_size": 64, "depths": (1, 1), "window_size": 4},
        {"embed_dim": 32, "num_heads": (2, 4)},
        {"embed_dim": 16, "num_heads": (1, 2)},
    ),
    "coat_lite_tiny": (
        {"img_size": 32, "serial_depths": (1, 1, 1, 1)},
        {"embed_dims": (32, 32, 64, 64)},
        {"embed_dims": (16, 16, 32, 32)},
    ),
    "vit_srelpos_small_patch16_224": (
        {"img_size": 32, "patch_size": 8, "depth": 2},
        {"embed_dim": 64, "num_heads": 8},
        {"embed_dim": 32, "num_heads": 4},
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_weights_that_are_computed_shared_modules_and_tables_of_all_blocks_stay_consistent(name):
    both, large, small = ODD[name]
    teacher, student = (lively(create_model(name, num_classes=7, **both, **sizes)) for sizes in (large, small))
    images = images_for(teacher, 4, None if "img_size" in both else 32)
    for parameter in student.parameters():
        parameter.data.fill_(torch.nan)
    first = select_weights(teacher, student, element_selection="greedy", calibration=images, include_head=True)
    student.load_state_dict(first)
    with torch.no_grad():
        assert student(images).isfinite().all()
        if large == small:
            torch.testing.assert_close(student(images), teacher(images))
    if "srelpos" in name:  # the table of all blocks has one element per head, and blocks keep the same heads
        large, small = (model.shared_rel_pos.mlp.fc2.weight for model in (teacher, student))
        assert [(row == large[:, 0]).nonzero().item() for row in small[:, 0]] == [0, 2, 4, 6]
        symmetries = Symmetries(teacher, structure_of(teacher, "teacher").neurons)
        assert not symmetries.attentions, "these heads are chosen apart from their table"
        assert symmetries.rotated()
        return
    with pytest.raises(InputError, match="choose greedy"):
        select_weights(teacher, student, element_selection="project", calibration=images)


def closeness(teacher, student, first, images):
    """Correlation of what a student with its first weights and the teacher compute."""
    student = copy.deepcopy(student)
    student.load_state_dict(first, strict=False)
    with torch.no_grad():
        both = torch.stack([model.eval()(images).flatten() for model in (teacher, student)])
    return torch.corrcoef(both)[0, 1].item()


PRE_NORM = {"img_size": 32, "patch_size": 8, "num_classes": 7, "depth": 2, "pre_norm": True, "mlp_ratio": 2}
PAIRS = {
    "norm in the stream": ("vit_tiny", PRE_NORM, {"embed_dim": 64, "num_heads": 4}, {"embed_dim": 32, "num_heads": 2}),
    "a ratio that is no integer": (
        "vit_tiny",
        PRE_NORM | {"pre_norm": False},
        {"embed_dim": 60, "num_heads": 4},
        {"embed_dim": 36, "num_heads": 3},
    ),
    "fewer layers": (
        "vit_tiny",
        PRE_NORM | {"pre_norm": False, "embed_dim": 48, "num_heads": 4},
        {"depth": 5},
        {"depth": 3},
    ),
    "half the width, fewer layers": (
        "vit_tiny",
        PRE_NORM | {"pre_norm": False, "init_values": 0.5},
        {"depth": 5, "embed_dim": 64, "num_heads": 4},
        {"depth": 3, "embed_dim": 32, "num_heads": 2},
    ),
    "other images": (
        "vit_tiny",
        {"patch_size": 8, "num_classes": 7, "depth": 2, "mlp_ratio": 2},
        {"embed_dim": 64, "num_heads": 4, "img_size": 64},
        {"embed_dim": 32, "num_heads": 2, "img_size": 32},
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_projected_weights_are_nearer_to_the_teacher_than_selected_ones(kind):
    architecture, both, large, small = PAIRS[kind]
    torch.manual_seed(0)
    teacher = create_model(architecture, **{**both, **large}).eval()
    student = create_model(architecture, **{**both, **small}).eval()
    for parameter in teacher.parameters():  # weights that matter, few directions of them more than others
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
            parameter.data *= torch.linspace(2, 0, parameter.shape[1]) ** 2
    images = images_for(student, 32).float()
    seen = copy.deepcopy(teacher)
    if kind == "other images":
        seen.set_input_size(img_size=32)
    layers = {"layer_selection": "uniform", "include_head": True}  # 0, 2, 4 of five
    traced = [TracedModel.of(model, structure_of(model, kind)) for model in (seen, student)]
    plan = plan_selection(*(model.structure for model in traced), SelectionOptions(**layers))
    plain = closeness(seen, student, apply_plan(plan, seen.state_dict()), images)
    for method in ("project", "greedy") if kind != "fewer layers" else ("greedy",):
        given = select_weights(teacher, student, element_selection=method, calibration=images, **layers)
        again = first_weights(plan, *traced, images, method)
        assert closeness(seen, student, again, images) > plain + 0.03, method
        assert all(torch.equal(given[key], again[key]) for key in given), "the teacher was not brought to the images"


def test_a_norm_behind_the_last_norm_does_not_keep_the_stream_from_being_rotated():
    teacher, student = (model.float() for model in models("vit"))
    for model in (teacher, student):
        model.fc_norm = nn.LayerNorm(model.embed_dim)
    images = images_for(lively(teacher).float()).float()
    plain = closeness(teacher, student, select_weights(teacher, student, include_head=True), images)
    options = {"element_selection": "project", "calibration": images, "include_head": True}
    first = select_weights(teacher, student, **options)
    assert closeness(teacher, student, first, images) > plain + 0.03


def test_of_the_models_nothing_changes():
    teacher, student = (lively(model) for model in models("vit"))
    before = [{key: value.clone() for key, value in model.state_dict().items()} for model in (teacher, student)]
    teacher.train()
    select_weights(teacher, student, element_selection="project", calibration=images_for(teacher))
    assert teacher.training
    for model, weights in zip((teacher, student), before, strict=True):
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_weights_are_the_same_where_the_caller_trains_in_mixed_precision():
    teacher, student = (lively(model).float() for model in models("vit"))
    options = {"element_selection": "project", "calibration": images_for(teacher, 3)}
    first = select_weights(teacher, student, **options)
    with torch.autocast("cpu", torch.bfloat16):
        again = select_weights(teacher, student, **options)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_weights_have_the_teachers_type():
    teacher, student = models("vit")
    for dtype in (torch.bfloat16, torch.float64):
        made = select_weights(teacher.to(dtype), student, element_selection="project", calibration=images_for(teacher))
        assert {value.dtype for value in made.values()} == {dtype}


def test_a_classifier_that_is_not_there_reads_nothing_and_cannot_be_selected():
    teacher, student = models("vit")
    images = images_for(teacher).float()
    backbone = {key: value for key, value in teacher.state_dict().items() if not key.startswith("head.")}
    options = {"element_selection": "project", "calibration": images, "weights": backbone}
    first = select_weights(teacher, student, **options)
    teacher.head.weight.data += 1
    again = select_weights(teacher, student, **options)
    assert all(torch.equal(first[key], again[key]) for key in first)
    with pytest.raises(InputError, match="head.weight is absent"):
        select_weights(teacher, student, include_head=True, **options)


@pytest.mark.parametrize("classes", [0, 7])
def test_features_before_a_new_classifier_keep_their_sizes(classes):
    teacher, student = models("vit")
    lively(teacher).reset_classifier(classes)
    teacher.double().norm.weight.data *= 4
    images = images_for(teacher)
    student.load_state_dict(
        select_weights(teacher, student, element_selection="project", calibration=images), strict=False
    )
    with torch.no_grad():
        ours, theirs = (
            model.eval().forward_head(model.forward_features(images), pre_logits=True).double().square().mean()
            for model in (student.double(), teacher)
        )
    assert 0.8 < ours / theirs < 1.25


def test_a_teacher_whose_activations_overflow_is_refused():
    teacher, student = (model.float() for model in models("vit"))
    teacher.blocks[0].mlp.fc1.weight.data.fill_(1e38)
    with pytest.raises(InputError, match="blocks.0.mlp.fc2.weight takes is not finite"):
        select_weights(teacher, student, element_selection="greedy", calibration=images_for(teacher).float())
