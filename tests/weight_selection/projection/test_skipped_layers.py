"""Layers that a student leaves out: what the layers before them write for those between."""

import contextlib

import pytest
import torch

from architectures import SWIN_SIZES, TINY, VIT_SIZES, lively
from helpers import images_for
from traces import structure_of
from weight_selection import select_weights
from weight_selection.apply import apply_plan
from weight_selection.cli import main as select_main
from weight_selection.options import SelectionOptions
from weight_selection.plan import plan_selection
from weight_selection.projection import equations
from weight_selection.projection.project import project
from weight_selection.projection.traced_model import TracedModel
from weight_selection.sources.timm_models import create_model

SEVEN = {"num_classes": 7}
DEEP = {  # name: (architecture, options, what gives the number of layers, the teacher's, the student's)
    "vit": ("vit_tiny_patch16_224", TINY | {"patch_size": 8, "init_values": 0.1} | VIT_SIZES[0], "depth", 3, 2),
    "beit": ("beit_base_patch16_224", TINY | {"patch_size": 8} | VIT_SIZES[0], "depth", 3, 2),
    "eva02": ("eva02_tiny_patch14_224", TINY | {"patch_size": 8, "mlp_ratio": 2} | VIT_SIZES[0], "depth", 3, 2),
    "cait": ("cait_xxs24_224", TINY | {"patch_size": 8} | VIT_SIZES[0], "depth", 3, 2),
    "xcit": ("xcit_nano_12_p16_224", TINY | VIT_SIZES[0], "depth", 3, 2),
    "mixer": ("mixer_s32_224", TINY | {"patch_size": 8, "embed_dim": 32}, "num_blocks", 3, 2),
    "convnext": ("convnext_tiny", SEVEN | {"dims": (16, 16, 32, 32)}, "depths", (1, 3, 1, 1), (1, 2, 1, 1)),
    "convnext, convolutions": (
        "convnext_tiny",
        SEVEN | {"dims": (16, 16, 32, 32), "conv_mlp": True},
        "depths",
        (1, 3, 1, 1),
        (1, 2, 1, 1),
    ),
    "swin": ("swin_tiny_patch4_window7_224", TINY | {"window_size": 4} | SWIN_SIZES[0], "depths", (2, 3), (2, 2)),
}


def deep(name):
    architecture, options, depth, theirs, ours = DEEP[name]
    return [lively(create_model(architecture, **{**options, depth: layers})) for layers in (theirs, ours)]


@pytest.mark.parametrize("name", DEEP)
def test_layers_left_out_that_add_a_constant_are_made_up_for(name):
    teacher, student = deep(name)
    traced = [TracedModel.of(model, structure_of(model, name)) for model in (teacher, student)]
    options = SelectionOptions(layer_selection="uniform", include_head=True)
    plan = plan_selection(*(model.structure for model in traced), options)
    kept = {entry.teacher_key for entry in plan.entries}
    for key, value in teacher.state_dict().items():
        if key not in kept and value.ndim > 1:
            value.zero_()
    side = None if "img_size" in DEEP[name][1] else 32
    images = images_for(teacher, side=side)
    for near in (False, True):
        first = project(plan.selected, *traced, [images], "greedy") if near else apply_plan(plan, teacher.state_dict())
        student.load_state_dict(first)
        with torch.no_grad():
            theirs, ours = (model(images_for(teacher, 3, side)) for model in (teacher, student))
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item()) == near


def test_a_dry_run_names_the_layers_that_are_written_for(cli, capsys):
    kwargs = " ".join(f"{key}={value}" for key, value in TINY.items())
    pair = f"--pretrained_model vit_tiny --teacher_kwargs depth=4 {kwargs} --student vit_tiny --student_kwargs depth=2"
    words = f"{pair} {kwargs} --output_dir none --element_selection greedy --dry_run --verbose".split()
    for layers, expected in (("first_n", []), ("uniform", ["blocks.0.mlp.fc2.weight"])):
        assert cli(select_main, *words, "--layer_selection", layers) is None
        lines = [line for line in capsys.readouterr().out.splitlines() if "also gives" in line]
        assert [line.split()[0] for line in lines] == expected
    assert lines[0].endswith("least-squares up map, also gives what the layers up to blocks.1 add, if it ends in a sum")


def test_what_a_layer_writes_for_those_left_out_is_their_ridge_regression():
    teacher, student = deep("vit")
    images = images_for(teacher, 6)
    seen = {}
    with contextlib.ExitStack() as hooks:
        block = teacher.blocks[0]
        hooks.enter_context(block.mlp.fc2.register_forward_hook(lambda _, z, y: seen.update(z=z[0])))
        hooks.enter_context(block.register_forward_hook(lambda _, x, y: seen.update(before=y)))
        hooks.enter_context(teacher.blocks[1].register_forward_hook(lambda _, x, y: seen.update(last=y)))
        teacher(images)
    z = seen["z"].flatten(0, 1)
    lost = ((seen["last"] - seen["before"]) / block.ls2.gamma).flatten(0, 1)
    ridge = (equations.RIDGE * z.square().mean() * len(z)).sqrt()
    units = z.shape[1]
    towards = torch.cat([ridge * torch.eye(units), torch.zeros(units, 1)], 1)
    rows = torch.cat([torch.cat([z, torch.ones(len(z), 1)], 1), towards])
    written = torch.linalg.lstsq(rows, torch.cat([lost, torch.zeros(units, lost.shape[1])])).solution
    given = select_weights(teacher, student, layer_selection="uniform", element_selection="greedy", calibration=images)
    for name, added in (("weight", written[:-1].T), ("bias", written[-1])):
        expected = block.mlp.fc2.state_dict()[name] + added
        torch.testing.assert_close(given[f"blocks.0.mlp.fc2.{name}"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "options", "large", "small", "layer"),
    [
        (
            "resnet18",
            SEVEN | {"channels": (8, 16, 16, 16)},
            {"layers": (1, 4, 1, 1)},
            {"layers": (1, 3, 1, 1)},
            "layer2.1",
        ),
        ("swinv2_tiny_window8_256", TINY | {"window_size": 4}, {"depths": (3,)}, {"depths": (2,)}, "layers.0.blocks.0"),
    ],
)
def test_layers_that_end_in_no_plain_sum_write_nothing_for_others_and_it_is_said(
    architecture, options, large, small, layer, capsys
):
    options = {**options, "embed_dim": 16, "num_heads": (1,)} if "depths" in large else options
    teacher, student = (lively(create_model(architecture, **options, **sizes)) for sizes in (large, small))
    layers = {"layer_selection": "uniform"}
    images = images_for(teacher, side=32)
    given = select_weights(teacher, student, element_selection="greedy", calibration=images, **layers)
    plain = select_weights(teacher, student, **layers)
    written = [key for key in plain if key.startswith(f"{layer}.") and ".bn" not in key]  # those have new statistics
    assert written and all(torch.allclose(given[key], plain[key], rtol=0, atol=1e-13) for key in written)
    assert f"{layer}: ends in no plain sum; nothing makes up for what is left out to " in capsys.readouterr().out
