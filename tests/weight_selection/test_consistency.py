"""All tensors that share a set of neurons keep the same neurons."""

import re

import pytest
import torch

from helpers import meta
from pairs import IMAGE, PAIRS, VIT, numbered, origins
from weight_selection.apply import apply_plan
from weight_selection.options import CONSISTENT, ELEMENT_SELECTION
from weight_selection.plan import make_plan


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
        {"embed_dim": 96, "depth": 2, "num_heads": 6, "mlp_ratio": 2, **IMAGE},
        {"half": {"embed_dim": 48, "depth": 1, "num_heads": 3, "mlp_ratio": 2, **IMAGE}},
        {"other": {"embed_dim": 80, "depth": 1, "num_heads": 5, "mlp_ratio": 2, **IMAGE}},
    ),
    "convnext": (
        {"dims": (24, 48, 96, 192), "depths": (2, 1, 2, 1), "num_classes": 5},
        {"half": {"dims": (12, 24, 48, 96), "depths": (1, 1, 1, 1), "num_classes": 5}},
        {"other": {"dims": (16, 40, 60, 160), "depths": (1, 1, 1, 1), "num_classes": 5}},
    ),
}


def kept_neurons(architecture, method, teacher, student):
    """{set of neurons: all the different choices that were made in it}, over all the tensors of a student."""
    source = numbered(teacher)
    plan = make_plan(teacher, student, include_head=True, element_selection=method)
    chosen = apply_plan(plan, source)
    found = {}
    for entry in plan.entries:
        covered = [
            (dim, space)
            for pattern, dim, space in SPACES[architecture]
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


def widths(architecture, which):
    large, half, other = WIDTHS[architecture]
    pair = PAIRS[architecture]
    return meta(pair.teacher, **large), meta(pair.student, **{**half, **other}[which])


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


@pytest.mark.parametrize("which", ["half", "other"])
@pytest.mark.parametrize("method", ["uniform", "consecutive", "random"])
@pytest.mark.parametrize("architecture", PAIRS)
def test_consistent_rules_keep_the_same_neurons_everywhere(architecture, method, which):
    for space, choices in kept_neurons(architecture, method, *widths(architecture, which)).items():
        assert len(choices) == 1, space
        assert min(next(iter(choices))) >= 0


@pytest.mark.parametrize("method", ["random_inconsistent", "l1"])
@pytest.mark.parametrize("architecture", PAIRS)
def test_inconsistent_rules_choose_anew_in_every_tensor(architecture, method):
    for space, choices in kept_neurons(architecture, method, *widths(architecture, "half")).items():
        assert len(choices) > 1, space


def test_stream_of_a_width_that_does_not_divide_is_the_rounded_grid():
    kept = kept_neurons("vit", "uniform", *widths("vit", "other"))["stream"]
    assert kept == {tuple(torch.linspace(0, 95, 80, dtype=torch.float64).round().int().tolist())}


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
