"""torchvision's models: a student hidden in a larger teacher is found again; layers, classifiers, positions."""

import re
import sys
from functools import partial

import pytest
import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.maxvit import MaxVit, RelativePositionalMultiHeadAttention
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

from processes import environment, start
from proofs import check_consistent, check_hidden, structures
from weight_selection import select_weights
from weight_selection.apply import apply_plan
from weight_selection.errors import InputError
from weight_selection.plan import make_plan
from weight_selection.sources.torchvision_models import model_facts

CLASSES = 7


def resnet(block, layers, width, **kwargs):
    """A ResNet of other widths than torchvision's, which are fixed."""
    with torch.device("meta"):
        model = ResNet(block, [1] * 4, num_classes=CLASSES, **kwargs)
        model.inplanes = width
        model.conv1, model.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        for number, depth in enumerate(layers):
            stage = model._make_layer(block, width * 2**number, depth, stride=1 + (number > 0))
            setattr(model, f"layer{number + 1}", stage)
        model.fc = nn.Linear(model.inplanes, CLASSES)
    return model.to_empty(device="cpu")


def vgg(channels, hidden):
    """A VGG of other widths than torchvision's; its classifier reads 7x7 places of the last channels."""
    with torch.device("meta"):
        model = VGG(make_layers(channels), init_weights=False)
        layers = [nn.Linear(49 * channels[-2], hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU()]
        model.classifier = nn.Sequential(*layers, nn.Dropout(), nn.Linear(hidden, CLASSES))
    return model.to_empty(device="cpu")


def mobilenet_v3(width):
    setting = partial(InvertedResidualConfig, dilation=1, width_mult=width)
    return MobileNetV3(
        [
            setting(8, 3, 16, 16, True, "RE", 2),
            setting(16, 5, 32, 24, False, "HS", 2),
            setting(24, 5, 48, 24, True, "HS", 1),
        ],
        int(64 * width),
        num_classes=CLASSES,
    )


def efficientnet(width, depth):
    setting = partial(MBConvConfig, width_mult=width, depth_mult=depth)
    fused = FusedMBConvConfig(2, 3, 2, int(32 * width), int(32 * width), 1)
    stages = [setting(2, 3, 1, 16, 16, 1), setting(4, 5, 2, 16, 32, 2), fused]
    return EfficientNet(stages, 0.0, num_classes=CLASSES, last_channel=int(64 * width))


def convnext(width, depth):
    stages = [CNBlockConfig(width, 2 * width, depth), CNBlockConfig(2 * width, None, 1)]
    return ConvNeXt(stages, num_classes=CLASSES)


def swin(width, depth, window=4, **kwargs):
    heads, window = [width // 8, width // 4], [window, window]
    return SwinTransformer([4, 4], width, [depth, 2], heads, window, num_classes=CLASSES, **kwargs)


swin_v2 = partial(swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def vit(width, depth, size=16, patch=8):
    return VisionTransformer(size, patch, depth, width // 8, width, 2 * width, num_classes=CLASSES)


def maxvit(width, depth):
    return MaxVit((32, 32), width, 4, [width, 2 * width], [depth, 1], 8, 0.0, num_classes=CLASSES)


def regnet(width, depth):
    stages = BlockParams([1, depth], [width, 2 * width], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return RegNet(stages, CLASSES, stem_width=width)


def densenet(growth, blocks):
    return DenseNet(growth, blocks, 2 * growth, 2, num_classes=CLASSES)


# name: (teacher, student, side of the images in pixels). Where layers are normalised over their width, the teacher has
# twice the student's, so that every neuron can be there twice.
PAIRS = {
    "resnet": (lambda: resnet(BasicBlock, (2, 3, 1, 1), 16), lambda: resnet(BasicBlock, (1, 2, 1, 1), 6), 32),
    "resnet_bottleneck": (lambda: resnet(Bottleneck, (2, 3, 1, 1), 8), lambda: resnet(Bottleneck, (1, 2, 1, 1), 4), 32),
    "resnext": (
        lambda: resnet(Bottleneck, (2, 1, 1, 1), 8, groups=4, width_per_group=32),
        lambda: resnet(Bottleneck, (1, 1, 1, 1), 4, groups=2, width_per_group=32),
        32,
    ),
    "vgg": (lambda: vgg([8, 8, "M", 16, 16, 16, "M"], 32), lambda: vgg([4, "M", 8, 8, "M"], 16), 16),
    "mobilenet_v2": (
        lambda: MobileNetV2(CLASSES, 0.5, [[1, 16, 1, 1], [6, 24, 2, 2]], 4),
        lambda: MobileNetV2(CLASSES, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2]], 4),
        32,
    ),
    "mobilenet_v3": (lambda: mobilenet_v3(2), lambda: mobilenet_v3(1), 32),
    "efficientnet": (lambda: efficientnet(1, 1.5), lambda: efficientnet(0.5, 1), 32),
    "convnext": (lambda: convnext(16, 3), lambda: convnext(8, 2), 32),
    "swin": (lambda: swin(16, 4), lambda: swin(8, 2), 32),
    "swin_v2": (lambda: swin_v2(16, 4), lambda: swin_v2(8, 2), 32),
    "vit": (lambda: vit(32, 3), lambda: vit(16, 2), 16),
    "maxvit": (lambda: maxvit(32, 2), lambda: maxvit(16, 1), 32),
    "regnet": (lambda: regnet(32, 3), lambda: regnet(16, 2), 32),
    "densenet": (lambda: densenet(8, (2, 4, 3)), lambda: densenet(4, (2, 3, 2)), 32),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    """Name, teacher, student, the side of images, and the structures of both, of one pair after another."""
    teacher, student, side = PAIRS[request.param]
    teacher, student = teacher(), student()
    return request.param, teacher, student, side, structures(teacher, student, torch.empty(1, 3, side, side))


def test_a_student_hidden_in_a_teacher_is_what_the_teacher_computes_and_is_found_again(pair):
    name, teacher, student, side, both = pair
    for module in teacher.modules():
        if isinstance(module, RelativePositionalMultiHeadAttention):
            module.scale_factor *= 2**0.5  # width^-0.5: a constant that selection does not make up for
    images = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_hidden(teacher, student, both, (images,), chain=name == "vgg")


@pytest.mark.parametrize("pair", ["resnext", "swin", "vit", "densenet"], indirect=True)
def test_all_that_meets_in_a_sum_or_a_product_keeps_the_same_neurons(pair):
    _, teacher, student, _, both = pair
    check_consistent(teacher, both)


# ---------------------------------------------------------------------------------------------------------
# Layers, classifiers, positions


def sources(teacher, student, **options):
    """{student's key: teacher's key} of what is selected."""
    selected = make_plan(teacher, student, **options).selected
    return {key: entry.teacher_key for key, entry in selected.items()}


def test_rules_choose_among_layers_whatever_they_are_called():
    block = "encoder.layers.encoder_layer_{}.ln_1.weight"
    assert sources(vit(16, 4), vit(8, 2), layer_selection="last_n")[block.format(1)] == block.format(3)
    chosen = sources(vgg([8, 8, "M", 16, 16, 16, "M"], 32), vgg([4, "M", 8, 8, "M"], 16), layer_selection="last_n")
    assert {key: chosen[key] for key in ("features.0.weight", "features.3.weight", "features.5.weight")} == {
        "features.0.weight": "features.0.weight",
        "features.3.weight": "features.5.weight",
        "features.5.weight": "features.9.weight",
    }


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("alexnet", "classifier.6"),
        ("squeezenet1_1", "classifier.1"),
        ("mobilenet_v3_small", "classifier.3"),
        ("vit_b_32", "heads.head"),
        ("swin_t", "head"),
    ],
)
def test_the_layer_that_gives_the_classes_is_the_students_own(name, classifier):
    with torch.device("meta"):
        model = models.get_model(name)
    pattern = model_facts(model).architecture.classifier
    assert [key for key in model.state_dict() if re.search(pattern, key)] == [
        f"{classifier}.weight",
        f"{classifier}.bias",
    ]


def test_classifiers_that_only_training_uses_belong_to_the_task():
    with torch.device("meta"):
        model = models.googlenet(init_weights=False)
    pattern = model_facts(model).architecture.classifier
    assert {key.partition(".")[0] for key in model.state_dict() if re.search(pattern, key)} == {"aux1", "aux2", "fc"}


def test_a_classifier_may_be_replaced_as_users_do():
    teacher, student = resnet(BasicBlock, (1, 1, 1, 1), 8), resnet(BasicBlock, (1, 1, 1, 1), 4)
    student.fc = nn.Sequential(nn.Dropout(), nn.Linear(32, 3))
    assert make_plan(teacher, student).left_out == ["fc.1.weight", "fc.1.bias"]
    student.fc = nn.Sequential(nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 3))
    assert make_plan(teacher, student).left_out == ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]
    student.fc = nn.Identity()
    assert make_plan(teacher, student).left_out == []


def test_components_can_be_excluded():
    every = ("attention", "mlp", "norm", "patch_embed", "pos_embed")
    assert list(make_plan(vit(32, 1), vit(16, 1), exclude=every).selected) == ["class_token"]
    with pytest.raises(
        InputError, match="--exclude attention: convnext has no such component; it has norm, patch_embed, mlp"
    ):
        make_plan(convnext(16, 1), convnext(8, 1), exclude=every)


def test_position_embeddings_and_patches_of_other_images_are_resampled():
    teacher, student = vit(16, 1, size=48, patch=8), vit(8, 1, size=16, patch=4)
    table = nn.init.normal_(teacher.encoder.pos_embedding).detach()
    chosen = select_weights(teacher, student)
    expected = resample_abs_pos_embed(table, [4, 4], [6, 6], num_prefix_tokens=1)[..., ::2]
    assert torch.equal(chosen["encoder.pos_embedding"], expected)
    expected = resample_patch_embed(teacher.conv_proj.weight.detach(), [4, 4])[::2]
    assert torch.equal(chosen["conv_proj.weight"], expected)


def test_a_window_of_another_size_keeps_its_own_index_and_takes_a_resampled_table():
    teacher, student = swin(16, 2, window=7), swin(8, 2)
    attention = "features.1.0.attn.relative_position_"
    plan = make_plan(teacher, student)
    assert {entry.role for entry in plan.entries if entry.key.endswith("_index")} == {"constant"}
    assert f"{attention}index" in plan.left_out
    table = nn.init.normal_(teacher.get_parameter(f"{attention}bias_table")).detach()
    expected = resize_rel_pos_bias_table(table, (4, 4), (49, 2))[:, ::2]
    chosen = apply_plan(plan, teacher.state_dict())
    assert torch.equal(chosen[f"{attention}bias_table"], expected)
    student.load_state_dict(chosen, strict=False)
    assert student(torch.zeros(1, 3, 32, 32)).shape == (1, CLASSES)


def test_windows_of_swin_v2_have_no_table():
    plan = make_plan(swin_v2(16, 2, window=7), swin_v2(8, 2))
    constants = {entry.key.rpartition(".")[2] for entry in plan.entries if entry.role == "constant"}
    assert constants == {"relative_position_index", "relative_coords_table"}


def select_alone():
    """Select the student of two published architectures, where no other library of models can be imported."""
    others = ("timm", "transformers", "huggingface_hub")
    for name in list(sys.modules):
        if name.partition(".")[0] in (*others, "open_clip", "weight_selection"):
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(others))
    import weight_selection

    teacher, student = models.resnet34(), models.resnet18()
    report = student.load_state_dict(weight_selection.select_weights(teacher, student), strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"] and not report.unexpected_keys
    assert torch.equal(student.layer4[1].conv2.weight, teacher.layer4[1].conv2.weight)


def test_timm_and_hugging_face_are_not_needed(tmp_path):
    alone = start(select_alone, [environment()], tmp_path)
    assert alone.wait() == [0], alone.printed(0, "err")
