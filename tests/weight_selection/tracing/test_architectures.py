"""Whatever the architecture, coupled neurons stay together, and a student hidden in a larger teacher is found again."""

import re

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table

import coverage
from architectures import MODELS, models
from helpers import meta
from proofs import check_consistent, check_hidden, structures_of_pair
from weight_selection.apply import apply_plan
from weight_selection.errors import InputError
from weight_selection.plan import make_plan
from weight_selection.report import tensor_words
from weight_selection.rules import element_indices
from weight_selection.sources.facts import facts_of
from weight_selection.sources.timm_models import create_model, input_size
from weight_selection.tracing.trace import trace


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """Name, teacher, student and the structures of both, of one pair after another."""
    return request.param, *models(request.param), structures_of_pair(request.param)


def test_a_student_hidden_in_a_teacher_is_what_the_teacher_computes_and_is_found_again(pair):
    name, teacher, student, both = pair
    images = torch.randn(2, *input_size(student), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_hidden(teacher, student, both, (images,), chain=name == "vgg")


def test_all_that_meets_in_a_sum_or_a_product_keeps_the_same_neurons(pair):
    name, teacher, student, both = pair
    if name == "vgg":
        pytest.skip("its layers have streams of their own")
    check_consistent(teacher, both)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("method", ["uniform", "random"])
def test_every_planned_pair_of_timms_models_keeps_the_same_neurons(request, method):
    if not request.config.getoption("--all"):
        pytest.skip("only with --all: takes an hour")
    for names in coverage.models_by_architecture().values():
        models = coverage.describe(names)
        neurons = {name: numbered_neurons(name) for _, name, found in models if not isinstance(found, InputError)}
        for (small, student), (large, teacher) in coverage.pairs(models):
            try:
                plan = coverage.plan_pair(teacher, student)
            except InputError:
                continue
            check_places(plan, neurons[large], neurons[small], method, f"{small} from {large}")


def numbered_neurons(name):
    """{key: for each dimension the number of the neuron at each index}."""
    traced = trace(meta(name), facts_of(meta(name)).inputs)
    return {key: [traced.labels.find(dim).numpy() for dim in dims] for key, dims in traced.dims.items()}


def check_places(plan, teacher, student, method, pair):
    """As ``check_neurons``, of the places alone: without a weight.

    Where layers that are no residual branch were dropped, the neurons before them take the place of those after, by the
    same indices.
    """
    count = max(dim.max() for dims in student.values() for dim in dims) + 1
    kept, index = np.full(count, -1), np.full((count, 2), -1)
    for entry in plan.entries:
        for dim, slices in entry.slices.items():
            for one in slices:
                theirs, ours = one.teacher, one.student
                shape = torch.empty(theirs.shape, device="meta")
                chosen = [element_indices(method, shape, axis, size).numpy() for axis, size in enumerate(ours.shape)]
                large = teacher[entry.teacher_key][dim][theirs[np.ix_(*chosen)]].flatten()
                place = np.arange(theirs.size).reshape(theirs.shape)[np.ix_(*chosen)].flatten()
                place = np.stack([place, np.full_like(place, theirs.size)], axis=1)
                small = student[entry.key][dim][ours].flatten()
                same = (kept[small] == large) | (index[small] == place).all(axis=1)
                assert (same | (kept[small] == -1)).all(), f"{pair}: {entry.key}, dimension {dim}"
                kept[small], index[small] = large, place


# ---------------------------------------------------------------------------------------------------------
# Layers


def sources(teacher, student, method, pattern):
    """{group 1 of a pattern in a student's key: the same of the teacher's}, in the student's order."""
    plan = make_plan(teacher, student, layer_selection=method)
    found = ((re.search(pattern, entry.key), re.search(pattern, entry.teacher_key or "")) for entry in plan.entries)
    return {ours[1]: theirs[1] for ours, theirs in found if ours and theirs}


@pytest.mark.parametrize(
    ("method", "last"),
    [("first_n", "0 1 2 3"), ("mid_n", "0 2 3 4"), ("last_n", "0 3 4 5"), ("uniform", "0 1 3 5")],
)
def test_a_block_that_downsamples_stays_and_rules_choose_of_the_others(method, last):
    teacher = meta("resnet34", layers=(3, 4, 6, 3))
    moved = sources(teacher, meta("resnet34", layers=(3, 4, 4, 3)), method, r"^layer3\.(\d+)\.conv1")
    assert " ".join(moved.values()) == last


@pytest.mark.parametrize(("method", "chosen"), [("first_n", "0 1"), ("last_n", "2 3")])
def test_rules_choose_among_the_layers_of_each_kind(method, chosen):  # local and global attention in turn
    teacher, student = (meta("twins_svt_small", depths=(1, 1, depth, 1)) for depth in (4, 2))
    moved = sources(teacher, student, method, r"^blocks\.2\.(\d+)\.norm1")
    assert " ".join(moved.values()) == chosen


def test_layers_may_lose_what_the_student_does_not_have():  # LayerScale, in fewer layers
    teacher, student = (
        meta("deit3_small_patch16_224", depth=4),
        meta("vit_tiny", class_token=True, no_embed_class=True, depth=2),
    )
    with pytest.raises(InputError, match="blocks.0.ls1.gamma: the student has no such tensor"):
        make_plan(teacher, student)
    plan = make_plan(teacher, student, layer_selection="last_n", allow_unused=True)
    assert {entry.key: entry.teacher_key for entry in plan.entries}["blocks.0.norm1.bias"] == "blocks.2.norm1.bias"


def test_a_plain_stack_has_layers_per_stage_between_poolings():
    moved = sources(meta("vgg16_bn"), meta("vgg11_bn"), "first_n", r"^features\.(\d+)\.weight")
    convolutions = {"0": "0", "4": "7", "8": "14", "11": "17", "15": "24", "18": "27", "22": "34", "25": "37"}
    assert moved.items() >= convolutions.items()
    assert moved["1"] == "1" and moved["5"] == "8"  # normalisations go with their convolutions


BLOCKS, SHALLOW = {"layers": (1, 1, 1, 1)}, {"depths": (1, 1, 1)}


@pytest.mark.parametrize(
    ("teacher", "student", "named"),
    [
        (("resnet18", {}), ("resnet34", {}), "layer1: teacher has 2 layers, student 3"),
        (("resnet50", BLOCKS), ("resnet18", BLOCKS), "layer1.0.conv3.weight: the student has no such tensor"),
        (("nest_tiny", SHALLOW), ("nest_tiny", SHALLOW | {"img_size": 112}), "levels.0.pos_embed, dimension 2"),
        (
            ("vit_giant_patch14_dinov2", {"depth": 1}),
            ("vit_small_patch14_dinov2", {"depth": 1}),
            "made of 2 parts in the",
        ),
        (("vgg16", {}), ("vgg11_bn", {}), "features"),
        (
            ("resnext101_64x4d", BLOCKS),
            ("resnet50", BLOCKS),
            "blocks of 64x4 in the teacher, 64 neurons in the student",
        ),
        (
            ("res2net50_26w_6s", BLOCKS),
            ("res2net50_14w_8s", BLOCKS),
            "6 parts in the teacher, of 8 parts in the student",
        ),
        (("ecaresnet50t", BLOCKS), ("ecaresnet26t", BLOCKS), "slides along neurons"),
        (
            ("mixer_b16_224", {"num_blocks": 1}),
            ("mixer_s16_224", {"num_blocks": 1, "img_size": 64}),
            "positions, not neurons",
        ),
        (
            ("eva02_small_patch14_224", {"depth": 1}),
            ("eva02_tiny_patch14_224", {"depth": 1, "num_heads": 6}),
            "must be the same",
        ),
        (
            ("convmixer_1536_20", {"depth": 1}),
            ("convmixer_1536_20", {"depth": 1, "dim": 768, "kernel_size": 7}),
            "positions, not neurons",
        ),
        (
            ("vit_small_patch16_224", {"depth": 1}),
            ("vit_tiny_patch16_224", {"depth": 1, "class_token": False, "global_pool": "avg"}),
            "cls",
        ),
    ],
)
def test_students_that_are_no_smaller_versions_are_refused_with_the_reason(teacher, student, named):
    with pytest.raises(InputError, match=re.escape(named)):
        make_plan(meta(teacher[0], **teacher[1]), meta(student[0], **student[1]))


# ---------------------------------------------------------------------------------------------------------
# Geometry


def selected_entry(teacher, student, key):
    """How a tensor is made, in words, and the tensor."""
    plan = make_plan(teacher, student)
    return tensor_words(plan.selected[key], plan), apply_plan(plan, teacher.state_dict())[key]


def test_a_student_for_small_images_from_a_teacher_for_large_ones():
    teacher = create_model("vit_tiny", embed_dim=48, num_heads=3, depth=1)
    student = meta("vit_tiny", embed_dim=24, num_heads=3, depth=1, img_size=32, patch_size=4, in_chans=1)
    weights = teacher.state_dict()
    words, positions = selected_entry(teacher, student, "pos_embed")
    assert words == "resample 14x14 to 8x8, uniform"
    expected = resample_abs_pos_embed(weights["pos_embed"], [8, 8], [14, 14], num_prefix_tokens=1)
    torch.testing.assert_close(positions, expected[..., ::2])
    words, kernel = selected_entry(teacher, student, "patch_embed.proj.weight")
    assert words == "adapt 3 channels to 1, resample 16x16 to 4x4, uniform"
    grey = weights["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(kernel, resample_patch_embed(grey, [4, 4])[::2])


@pytest.mark.parametrize(
    ("name", "sizes", "key", "extra"),
    [
        (
            "swin_tiny_patch4_window7_224",
            ({"window_size": 7}, {"window_size": 4, "img_size": 64}),
            "layers.0.blocks.0.attn.relative_position_bias_table",
            0,
        ),
        ("beit_base_patch16_224", ({}, {"img_size": 64}), "blocks.0.attn.relative_position_bias_table", 3),
    ],
)
def test_tables_of_relative_positions_are_resampled_and_their_heads_selected(name, sizes, key, extra):
    widths = [{"embed_dim": 8 * heads, "num_heads": heads, "depth": 1} for heads in (4, 2)]
    if name.startswith("swin"):
        widths = [{"embed_dim": 8 * heads, "num_heads": (heads,), "depths": (2,)} for heads in (4, 2)]
    teacher, student = create_model(name, **widths[0], **sizes[0]), meta(name, **widths[1], **sizes[1])
    teacher.load_state_dict({k: torch.rand_like(v) for k, v in teacher.state_dict().items()})
    words, table = selected_entry(teacher, student, key)
    assert words.startswith("resample relative positions of a ")
    source, window = teacher.state_dict()[key], student.get_submodule(key.rpartition(".")[0]).window_size
    expected = resize_rel_pos_bias_table(source, window, (table.shape[0], source.shape[1]))
    torch.testing.assert_close(table, expected[:, ::2])
    torch.testing.assert_close(table[table.shape[0] - extra :], source[source.shape[0] - extra :, ::2])
