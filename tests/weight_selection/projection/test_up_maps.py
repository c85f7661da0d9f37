"""The second pass: how it stands still at each layer, where layers add to streams, and what a layer is fitted to."""

import contextlib
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from architectures import SMALL, SWIN_SIZES, TINY, lively, models
from helpers import images_for, random
from traces import structure_of
from weight_selection import select_weights
from weight_selection.errors import InputError
from weight_selection.projection import equations
from weight_selection.projection.stepped_pass import SteppedPass
from weight_selection.projection.stream_sums import find_sums
from weight_selection.projection.traced_model import TracedModel
from weight_selection.sources.timm_models import create_model

TWO_LAYERS = TINY | {"patch_size": 8, "depth": 2}
RESNET = {"num_classes": 7, "channels": (8, 16, 16, 16)}
WIDTHS = (  # the student has half the width and all of the hidden units
    {"embed_dim": 32, "num_heads": 4, "mlp_ratio": 2},
    {"embed_dim": 16, "num_heads": 2, "mlp_ratio": 4},
)


def traced_model(model):
    return TracedModel.of(model, structure_of(model, "model"))


@pytest.fixture(scope="module")
def vit():
    return traced_model(lively(create_model("vit_tiny_patch16_224", **TWO_LAYERS, **WIDTHS[1])))


@contextlib.contextmanager
def stepping(traced, batch=None, outputs=()):
    one = SteppedPass(traced, random(2, 3, 32, 32) if batch is None else batch, outputs)
    try:
        yield one
    finally:
        one.close()


def threads():
    """The number of those that are no progress bar's."""
    return sum(type(thread) in (threading.Thread, type(threading.main_thread())) for thread in threading.enumerate())


def halt_at(one, key):
    """The first halt at a layer."""
    return next(halt for halt in iter(one.next, None) if halt.key == key)


def test_a_pass_stands_at_each_layer_in_their_order(vit):
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *(f"blocks.{number}.{name}" for number in (0, 1) for name in block), "norm", "head"]
    with stepping(vit) as one:
        halts = list(iter(one.next, None))
        assert one.next() is None, "once more after the end"
    assert [halt.key for halt in halts] == [f"{layer}.weight" for layer in layers]


def test_a_pass_keeps_what_a_layer_gives_as_it_was():
    """The activation behind the first layer works in place."""
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)))
    images = random(2, 3, 8, 8)
    traced = TracedModel.of(model, structure_of(model, "model", images, ()))
    with stepping(traced, images, outputs={"0.weight"}) as one:
        halt_at(one, "0.weight")
        assert not one.given, "the layer has not run"
        halt_at(one, "2.weight")
    torch.testing.assert_close(dict(one.given), {"0.weight": [model[0](images)]})


def test_weights_that_are_changed_before_a_layer_runs_take_effect(vit):
    mlp = vit.model.blocks[0].mlp
    before = mlp.fc1.weight.detach().clone()
    with stepping(vit) as one:
        halt_at(one, "blocks.0.mlp.fc1.weight")
        mlp.fc1.weight.data.zero_()
        hidden = one.next().x
    mlp.fc1.weight.data.copy_(before)
    torch.testing.assert_close(hidden, torch.nn.functional.gelu(mlp.fc1.bias).expand_as(hidden))


def test_what_the_model_raises_is_raised_by_the_next_step(vit):
    with stepping(vit, random(2, 1, 32, 32)) as one:
        assert one.next().key == "patch_embed.proj.weight"
        with pytest.raises(RuntimeError, match="channels"):
            one.next()


def test_no_thread_is_left_of_a_pass_that_is_closed_or_of_a_projection_that_fails(vit, monkeypatch):
    running = threads()
    for number in (0, 3):
        with stepping(vit) as one:
            for _ in range(number):
                one.next()
            assert threads() == running + 1
        assert threads() == running
    solve, solved = equations.solve_up_map, []

    def fail_at_the_third(*args, **kwargs):
        solved.append(threads())
        if len(solved) == 3:
            raise MemoryError("of a layer")
        return solve(*args, **kwargs)

    monkeypatch.setattr(equations, "solve_up_map", fail_at_the_third)
    teacher = lively(create_model("vit_tiny_patch16_224", **TWO_LAYERS, **WIDTHS[0]))
    with pytest.raises(MemoryError, match="of a layer"):
        select_weights(teacher, vit.model, element_selection="project", calibration=random(4, 3, 32, 32))
    assert solved == [running + 2] * 3, "teacher and student each ran in a thread"
    assert threads() == running


def efficientnet():
    return create_model("efficientnet_lite0", channel_multiplier=0.25, **SMALL)


def vision_transformer():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7)


def layer_scales(model):
    """{key of the dense layer before a LayerScale of a ViT: its gamma}."""
    gains = {}
    for number, block in enumerate(model.blocks):
        gains |= {
            f"blocks.{number}.attn.proj.weight": block.ls1.gamma,
            f"blocks.{number}.mlp.fc2.weight": block.ls2.gamma,
        }
    return gains


def block_scales(model):
    """The same of ConvNeXt."""
    blocks = [
        (f"stages.{s}.blocks.{b}", block)
        for s, stage in enumerate(model.stages)
        for b, block in enumerate(stage.blocks)
    ]
    return {f"{name}.mlp.fc2.weight": block.gamma for name, block in blocks}


def batch_norms(model):
    """{key of the last convolution of a residual block: what the batch normalisation behind it multiplies by}."""
    return {
        f"{name}.conv_pwl.weight": block.bn3.weight / (block.bn3.running_var + block.bn3.eps).sqrt()
        for name, block in model.named_modules()
        if getattr(block, "has_skip", False) and hasattr(block, "conv_pwl")
    }


def residual_norms(model):
    """The same of ResNets, where an activation follows the sum. A shortcut with a convolution runs last."""
    gains = {}
    for name, block in model.named_modules():
        shortcut = getattr(block, "downsample", None)
        if hasattr(block, "conv2"):
            key, norm = ("conv2", block.bn2) if shortcut is None else ("downsample.0", shortcut[1])
            gains[f"{name}.{key}.weight"] = norm.weight / (norm.running_var + norm.eps).sqrt()
    return gains


def second_blocks(model):
    """A ResNet that normalises first: shortcuts with convolutions have no norm."""
    return {f"stages.{stage}.blocks.1.conv3.weight": torch.ones(()) for stage in (0, 1)}


def ones(model):
    """Swin's MLPs; its attention where one window is the whole image."""
    keys = [
        *(f"0.blocks.{block}.mlp.fc2" for block in (0, 1)),
        *(f"1.blocks.{block}.{name}" for block in (0, 1) for name in ("attn.proj", "mlp.fc2")),
    ]
    return dict.fromkeys((f"layers.{key}.weight" for key in keys), torch.ones(()))


def ones_of_torchvision(model):
    names = "self_attention.out_proj", "mlp.3"
    layers = (f"encoder.layers.encoder_layer_{number}" for number in (0, 1))
    return {f"{layer}.{name}.weight": torch.ones(()) for layer in layers for name in names}


SUMS = {  # name: (model, side of its images, its sums with their gains)
    "vit": (lambda: models("vit")[1], 32, layer_scales),
    "swin": (lambda: create_model("swin_tiny_patch4_window7_224", **TINY, window_size=4, **SWIN_SIZES[1]), 32, ones),
    "convnext": (lambda: models("convnext")[1], 32, block_scales),
    "efficientnet": (efficientnet, 64, batch_norms),
    "torchvision": (vision_transformer, 32, ones_of_torchvision),
    "resnet": (lambda: models("resnet")[1], 32, residual_norms),
    "resnetv2": (lambda: create_model("resnetv2_50", layers=(2, 2), stem_chs=8, **RESNET), 64, second_blocks),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_found_where_layers_add_to_a_stream_with_their_gains(name):
    make, side, expected = SUMS[name]
    model = lively(make())
    found = find_sums(traced_model(model), random(3, 3, side, side))
    gains = expected(model)
    assert found.keys() == gains.keys()
    for key, gain in gains.items():
        torch.testing.assert_close(found[key].gain, gain.detach().double().expand_as(found[key].gain))
        assert found[key].by_place == ("self_attention" in key), key


def test_two_images_show_no_sum_behind_a_layer_that_sees_their_means():
    model = lively(models("efficientnet")[1])  # one of its squeeze-and-excitations has the width of the stream
    assert not [key for key in find_sums(traced_model(model), random(2, 3, 32, 32)) if ".se." in key]


def ridge_regression(z, wanted, prior):
    """Weight and bias, (inputs + 1, outputs), that bring z to what is wanted, and otherwise stay at the prior."""
    ridge = (equations.RIDGE * z.square().mean() * len(z)).sqrt()
    towards = torch.cat([ridge * torch.eye(z.shape[1]), torch.zeros(z.shape[1], 1)], 1)
    rows = torch.cat([torch.cat([z, torch.ones(len(z), 1)], 1), towards])
    return torch.linalg.lstsq(rows, torch.cat([wanted, ridge * prior])).solution


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva_giant_patch14_224"])
def test_a_layer_brings_the_students_stream_to_the_teachers_by_ridge_regression(architecture):
    """On what the student computes, also with biases in tensors of their own (BEiT, EVA): q_bias and v_bias."""
    layer_scale = {} if architecture.startswith("eva") else {"init_values": 0.1}
    pair = [lively(create_model(architecture, **TWO_LAYERS, **layer_scale, **sizes)) for sizes in WIDTHS]
    teacher, student = pair
    images = images_for(teacher, 8)
    given = select_weights(*pair, element_selection="greedy", include_head=True, calibration=images)
    student.load_state_dict(given)
    seen = []
    for model in pair:
        block, values = model.blocks[0], {}
        block.norm2.register_forward_hook(lambda _, x, y, values=values: values.update(before=x[0]))
        block.mlp.fc2.register_forward_hook(lambda _, x, y, values=values: values.update(z=x[0], y=y))
        block.register_forward_hook(lambda _, x, y, values=values: values.update(after=y))
        with torch.no_grad():
            model(images)
        seen.append({name: value.flatten(0, 1) for name, value in values.items()})
    theirs, ours = seen
    kept = (given["cls_token"][0, 0, :, None] == teacher.cls_token[0, 0]).int().argmax(1)  # greedy keeps coordinates
    gain = (ours["after"] - ours["before"])[0] / ours["y"][0]
    wanted = (theirs["after"][:, kept] - ours["before"]) / gain
    z, prior = ours["z"], teacher.blocks[0].mlp.fc2.weight.detach()[kept].T
    fitted = ridge_regression(z, wanted, prior)
    stream = ours["before"] + gain * (z @ fitted[:-1] + fitted[-1])
    torch.testing.assert_close(ours["after"], stream, rtol=1e-6, atol=1e-8)


def seen_of_block(block, model, images):
    """What the last convolution of a ResNet's block takes, as patches, and the sum behind it; rows."""
    last, values = block.conv2 if block.downsample is None else block.downsample[0], []
    hooks = [
        last.register_forward_pre_hook(lambda _, x: values.append(F.unfold(x[0], last.kernel_size, 1, last.padding))),
        block.act2.register_forward_pre_hook(lambda _, x: values.append(x[0].flatten(2).clone())),
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return [value.movedim(1, -1).flatten(0, 1) for value in values]


def test_a_layer_before_an_activation_brings_the_students_sum_to_the_teachers():
    """The student's stream is as wide as the teacher's, so Q is the identity. It has half the hidden units."""
    sizes = RESNET | {"layers": (2, 1, 1, 1)}
    pair = [lively(create_model("resnet18", **sizes, block_reduce_first=reduced)) for reduced in (1, 2)]
    images = images_for(pair[0], 8, 32)
    pair[1].load_state_dict(select_weights(*pair, element_selection="greedy", include_head=True, calibration=images))
    for number in (0, 1):  # a convolution on the shortcut runs last; else the block's last 3x3 convolution
        (_, should), (z, is_now) = (seen_of_block(model.layer1[number], model, images) for model in pair)
        lost, z = should - is_now, z - z.mean(0)
        assert lost.mean(0).abs().max() < 1e-9
        rest = lost - z @ torch.linalg.lstsq(z, lost).solution
        assert lost.norm() < 1.06 * rest.norm(), "little more is lost than without ridge"


class BothHalves(torch.nn.Module):
    """Two layers, which see the first half of an image's rows, and then the other half."""

    def __init__(self, hidden):
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, hidden), torch.nn.Linear(hidden, 5)

    def forward(self, images):
        return [self.second(self.first(half.flatten(1)).relu()) for half in images.split(2, dim=2)]


def test_a_layer_that_runs_twice_is_fitted_to_both_runs():
    teacher, student = lively(BothHalves(16)), BothHalves(8).double()
    images = random(40, 1, 4, 6) * torch.tensor([1.0, 1.0, 5.0, 5.0])[:, None]
    options = {"example_inputs": images[:1], "calibration": images, "classifier": ()}
    student.load_state_dict(select_weights(teacher, student, element_selection="greedy", **options))
    with torch.no_grad():
        halves = torch.cat([half.flatten(1) for half in images.split(2, dim=2)])
        x, z = teacher.first(halves).relu(), student.first(halves).relu()
    kept = (student.first.weight[:, 0, None] == teacher.first.weight[:, 0]).int().argmax(1)
    weight, bias = teacher.second.weight.detach(), teacher.second.bias.detach()
    fitted = ridge_regression(z, x @ weight.T + bias, weight[:, kept].T)
    torch.testing.assert_close(student.second.weight, fitted[:-1].T, rtol=1e-4, atol=1e-5)


class OfLittleMemory(BothHalves):
    """A model that has no room for more than 64 images at a time."""

    def forward(self, images):
        if len(images) > 64:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return super().forward(images)


def test_too_little_memory_is_said_in_one_line():
    teacher, student, images = lively(BothHalves(16)), OfLittleMemory(8), random(80, 1, 4, 6)
    options = {"example_inputs": images[:1], "calibration": images, "classifier": ()}
    with pytest.raises(InputError, match=r"^calibration: cpu has too little memory .* give fewer images \(tried to"):
        select_weights(teacher, student, element_selection="greedy", **options)
