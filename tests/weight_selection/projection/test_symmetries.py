"""What may be done with the neurons of a model, and what its layers take."""

from functools import cache

import pytest
import torch
import torch.nn as nn

from architectures import lively, models
from helpers import images_for, meta
from traces import structure_of
from weight_selection import select_weights
from weight_selection.errors import InputError
from weight_selection.projection import equations
from weight_selection.projection.activation_stats import ActivationStats
from weight_selection.projection.symmetries import HEADS, ROTATED, Symmetries
from weight_selection.projection.symmetry_check import check_streams
from weight_selection.projection.traced_model import TracedModel
from weight_selection.sources.timm_models import create_model


@cache
def symmetries_of(name):
    model = meta(name)
    return Symmetries(model, structure_of(model, name).neurons)


def test_treatments_follow_from_what_touches_the_neurons():
    symmetries = symmetries_of("vit_tiny")
    assert [attention.heads for attention in symmetries.attentions.values()] == [3] * 12
    assert symmetries.treatment(symmetries.slices("cls_token", 2)[0].group, True) == ROTATED
    assert symmetries.treatment(symmetries.slices("blocks.0.mlp.fc2.weight", 1)[0].group, True) == "strongest"
    rotary = symmetries_of("vit_small_patch16_dinov3")
    assert [(attention.heads, attention.free) for attention in rotary.attentions.values()] == [(6, False)] * 12
    assert rotary.treatment(rotary.slices("blocks.0.attn.qkv.weight", 0)[0].group, True) == HEADS
    assert rotary.treatment(rotary.slices("cls_token", 2)[0].group, True) == ROTATED


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_tiny", "conv_dw.weight works on single coordinates"),
        ("resnet18", "no layer normalisation takes it"),
    ],
)
def test_a_stream_that_is_tied_to_its_coordinates_is_not_rotated(name, reason):
    with pytest.raises(InputError, match=reason):
        check_streams(symmetries_of(name), name)


def test_a_rotation_that_structure_allows_but_the_function_does_not_is_refused():
    teacher, student = (lively(model) for model in models("mixer"))  # its hidden units are of tokens and channels
    with pytest.raises(InputError, match="computes something else when its residual stream is rotated; choose greedy"):
        select_weights(teacher, student, element_selection="project", calibration=images_for(teacher))


def test_heads_that_are_not_free_are_selected_uniformly_which_is_said(capsys):
    for name, count in (("vit", 1), ("cait", 0)):  # the heads of cait, which talk, are free
        teacher, student = (lively(model) for model in models(name))
        for block in (*teacher.blocks, *student.blocks) if name == "vit" else ():
            block.attn.q_norm = nn.ReLU()
        select_weights(teacher, student, element_selection="greedy", calibration=images_for(teacher))
        said = capsys.readouterr()
        assert (said.out + said.err).count("queries, keys and values are not free inside a head") == count


@pytest.mark.parametrize("batch", [1, 5])
def test_a_survey_has_the_moments_of_what_every_layer_takes(batch):
    model = lively(create_model("test_vit", num_classes=7))
    images = images_for(model, 5)
    traced = TracedModel.of(model, structure_of(model, "teacher"))
    with torch.no_grad():
        stats = ActivationStats(traced, images.split(batch))
        taken = {}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, key=f"{name}.weight": taken.__setitem__(key, args[0]))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        model(images)
    for hook in hooks:
        hook.remove()
    assert taken.keys() <= stats.moments.keys()
    for key, x in taken.items():
        x = x.reshape(-1, x.shape[-1])
        torch.testing.assert_close(stats.moments[key].variance, x.var(0, correction=0))
        if isinstance(stats.moments[key], equations.Moments):
            torch.testing.assert_close(stats.moments[key].mean[:-1, :-1], x.T @ x / len(x))
    assert stats.norm_of["blocks.1.mlp.fc1.weight"] == "blocks.1.norm2.weight"
