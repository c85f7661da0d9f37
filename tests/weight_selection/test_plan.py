"""Which teacher tensor each student tensor comes from: layers, positions, tokens, kernels."""

import pytest
import torch
from timm.layers import resample_patch_embed

from helpers import assert_same, meta, random_weights, read, words
from pairs import CONVNEXT, VIT
from weight_selection import select_weights
from weight_selection.apply import apply_plan
from weight_selection.cli import main as select_main
from weight_selection.errors import InputError
from weight_selection.plan import make_plan
from weight_selection.sources.timm_models import create_model


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
