"""Models by name, classic initialisations, and the declarations of architectures compared with real models."""

import math
import re

import pytest
import timm
import torch

from models.initialization import initialize
from training.options import parse_args
from training.setup import build_model
from weight_selection.errors import InputError
from weight_selection.sources import MODEL_TYPES
from weight_selection.sources.architectures import CONVNEXT, VIT
from weight_selection.sources.facts import facts_of
from weight_selection.sources.timm_models import PAPER_MODELS, create_model

DECLARED = {"convnext": CONVNEXT, "vit": VIT}
PAPER_SIZES = {  # width and depth
    "vit_tiny": (192, 12),
    "vit_small": (384, 12),
    "vit_base": (768, 12),
    "vit_large": (1024, 24),
    "vit_a": (192, 6),
    "vit_tiny_clip": (192, 12),
    "vit_base_clip": (768, 12),
    "convnext_femto": ((48, 96, 192, 384), (2, 2, 6, 2)),
    "convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
}


def shapes(name, **kwargs):
    return {k: tuple(v.shape) for k, v in create_model(name, device="meta", **kwargs).state_dict().items()}


@pytest.fixture(scope="module")
def declared_shapes():
    """{architecture: [shapes of the student, shapes of the teacher]} of the paper's main experiments."""
    return {name: [shapes(student), shapes(teacher)] for name, (student, teacher) in MODEL_TYPES.items()}


# ---------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(("name", "parameters"), [("vit_tiny", 5_717_416), ("convnext_femto", 5_217_784)])
def test_students_have_the_parameters_of_the_release(name, parameters):
    assert (
        sum(value.numel() for value in create_model(name, device="meta", num_classes=1000).parameters()) == parameters
    )


@pytest.mark.parametrize("name", sorted(PAPER_MODELS))
def test_paper_models_have_the_paper_sizes(name):
    model = create_model(name, device="meta", num_classes=100)
    if name.startswith("vit"):
        sizes = model.embed_dim, len(model.blocks)
    else:
        widths = tuple(stage.blocks[0].conv_dw.in_channels for stage in model.stages)
        sizes = widths, tuple(len(stage.blocks) for stage in model.stages)
    assert sizes == PAPER_SIZES[name]
    assert model.get_classifier().out_features == 100


def test_clip_student_is_laid_out_as_the_clip_teacher():
    assert shapes("vit_tiny_clip").keys() == shapes("vit_base_clip").keys()
    assert "norm_pre.weight" in shapes("vit_tiny_clip")
    assert {m.eps for m in create_model("vit_tiny_clip", device="meta").modules() if hasattr(m, "eps")} == {1e-5}


def test_timm_keeps_its_own_meaning_of_every_name():
    # convnext_femto is a name of both: ours has linear layers, timm's must keep its 1x1 convolutions.
    assert not any(timm.is_model(name) for name in PAPER_MODELS if name.startswith("vit"))
    fc1 = "stages.0.blocks.0.mlp.fc1.weight"
    assert shapes("convnext_femto")[fc1] == (192, 48)
    assert tuple(timm.create_model("convnext_femto").state_dict()[fc1].shape) == (192, 48, 1, 1)
    assert create_model("convnext_tiny_in22k", device="meta").num_classes == 21841


def test_arguments_replace_those_that_a_name_of_timms_fixes():
    model = create_model("mixer_s32_224", img_size=32, patch_size=4, embed_dim=24, num_classes=5)
    assert (model.stem.proj.kernel_size, model.stem.num_patches, model.embed_dim) == ((4, 4), 64, 24)
    assert len(model.blocks) == 8  # what is not given stays as the name has it
    assert create_model("mixer_s32_224", device="meta").embed_dim == 512  # and so does the name
    small = create_model("mixer_s32_224", input_size=32, device="meta", patch_size=8, pretrained=False)
    assert small.stem.num_patches == 16
    assert create_model("vgg11", model_cfg=(4, "M", 8), device="meta").num_features == 8


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small_patch16_224_in21k", "vit_small_patch16_224.augreg_in21k"])
def test_input_size_reaches_the_position_embedding(name):
    assert shapes(name, input_size=96)["pos_embed"][1] == 1 + 6 * 6


def test_input_size_changes_nothing_in_a_model_without_positions():
    assert shapes("convnext_femto", input_size=96) == shapes("convnext_femto")


@pytest.mark.parametrize(
    ("name", "kwargs", "named"),
    [
        ("vit_tinny", {}, ["--student vit_tinny", "vit_tiny"]),
        ("vit_small_patch16_224.in99k", {}, ["--student vit_small_patch16_224.in99k", "in99k"]),
        ("vit_tiny", {"embed_dim": 100}, ["--student vit_tiny", "embed_dim=100"]),
        ("vit_tiny", {"embed_dmi": 96}, ["--student vit_tiny", "embed_dmi"]),
        ("convnext_femto", {"depths": (1, 1)}, ["--student convnext_femto", "depths=(1, 1)"]),
    ],
)
def test_names_and_arguments_that_cannot_be_built_are_refused(name, kwargs, named):
    with pytest.raises(InputError) as refusal:
        create_model(name, option="--student", device="meta", **kwargs)
    assert all(word in str(refusal.value) for word in named), refusal.value


def test_a_model_without_drop_path_trains_unless_the_option_asks_for_it():
    words = ["--model", "convmixer_768_32", "--model_kwargs", "dim=8", "depth=1", "--input_size", "32", "--drop_path"]
    assert build_model(parse_args([*words, "0"]), classes=3).num_classes == 3
    with pytest.raises(InputError, match="drop_path_rate=0.1: .*unexpected keyword"):
        build_model(parse_args([*words, "0.1"]), classes=3)


def test_both_classifiers_of_a_distilled_model_are_scaled():
    words = "--model deit_tiny_distilled_patch16_224 --model_kwargs embed_dim=24 depth=1 num_heads=2 --head_init_scale"
    whole, tenth = (build_model(parse_args([*words.split(), scale]), classes=3) for scale in ("1", "0.1"))
    for head in ("head", "head_dist"):
        assert torch.equal(tenth.get_submodule(head).weight, 0.1 * whole.get_submodule(head).weight)


# ---------------------------------------------------------------------------------------------------------
# Initialisations


@pytest.fixture(scope="module", params=["vit_tiny", "convnext_femto"])
def initialized(request):
    """{scheme: state_dict after it}, from the same random initialisation, and that one itself."""
    sizes = {"depth": 2} if request.param.startswith("vit") else {"depths": (1, 1, 1, 1)}
    model = create_model(request.param, num_classes=10, **sizes)
    for value in model.parameters():  # so that a bias set to zero shows, and a norm left alone
        if value.ndim == 1:
            torch.nn.init.normal_(value)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = {}
    for scheme in ("timm", "xavier", "kaiming"):
        model.load_state_dict(before)
        torch.manual_seed(0)
        initialize(model, scheme)
        after[scheme] = {key: value.clone() for key, value in model.state_dict().items()}
    layers = {name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    return before, after, layers


def test_timm_initialisation_stays_as_it_is(initialized):
    before, after, _ = initialized
    assert all(torch.equal(before[key], after["timm"][key]) for key in before)


@pytest.mark.parametrize("scheme", ["xavier", "kaiming"])
def test_classic_initialisations_have_their_variance_in_every_layer(initialized, scheme):
    _, after, layers = initialized
    for layer in layers:
        weight = after[scheme][f"{layer}.weight"]
        fan_in, fan_out = weight[0].numel(), weight.shape[0] * weight[0, 0].numel()
        variance = 2 / (fan_in + fan_out) if scheme == "xavier" else 2 / fan_in
        assert weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.1), layer
        if scheme == "xavier":
            assert weight.abs().max().item() <= math.sqrt(3 * variance), layer


@pytest.mark.parametrize("scheme", ["xavier", "kaiming"])
def test_classic_initialisations_zero_the_biases_and_leave_the_rest(initialized, scheme):
    before, after, layers = initialized
    for key, value in after[scheme].items():
        layer, _, kind = key.rpartition(".")
        if layer in layers and kind == "bias":
            assert not value.any(), key
        elif layer not in layers:
            assert torch.equal(value, before[key]), key


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def test_mimetic_initialisation_gives_products_their_diagonals():
    d, heads = 192, 3
    model = create_model("vit_tiny", depth=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    initialize(model, "mimetic")
    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.detach().view(3, heads, d // heads, d)
        for head in range(heads):
            product = q[head].T @ k[head]
            assert torch.linalg.matrix_rank(product) == d // heads
            # the best approximation of rank d/3 keeps the third of the directions with most of the product
            assert product.diagonal().mean() > 0.35 and abs(off_diagonal(product).mean()) < 0.01
        product = v.reshape(d, d).T @ block.attn.proj.weight.detach().T
        assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=0.02)
        assert off_diagonal(product).std().item() == pytest.approx(0.4 / d**0.5, rel=0.05)
    assert not torch.equal(model.blocks[0].attn.proj.weight, model.blocks[1].attn.proj.weight)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"pos_embed"} | {f"blocks.{i}.attn.{name}.weight" for i in range(2) for name in ("qkv", "proj")}


def test_a_full_rank_head_has_exactly_the_mimetic_product():
    """With one head nothing is cut off: the product is 0.7 Z + 0.7 I with independent Z of variance 1/d."""
    model = create_model("vit_tiny", embed_dim=128, num_heads=1, depth=1)
    initialize(model, "mimetic")
    q, k, _ = model.blocks[0].attn.qkv.weight.detach().view(3, 128, 128)
    product = q.T @ k
    assert product.diagonal().mean().item() == pytest.approx(0.7, abs=0.03)
    assert off_diagonal(product).std().item() == pytest.approx(0.7 / 128**0.5, rel=0.05)


def test_mimetic_position_embeddings_tell_rows_and_columns():
    model = create_model("vit_tiny", embed_dim=64, num_heads=2, depth=1, reg_tokens=2)
    initialize(model, "mimetic")
    prefix, grid = model.pos_embed[0, :3].detach(), model.pos_embed[0, 3:].detach().view(14, 14, 64)
    assert not prefix.any()
    of_row = (grid == grid[:, :1]).flatten(0, 1).all(dim=0)  # dimensions that do not change along a row
    of_column = (grid == grid[:1]).flatten(0, 1).all(dim=0)
    assert of_row.sum() == of_column.sum() == 32 and not (of_row & of_column).any()
    assert len(grid.reshape(-1, 64).unique(dim=0)) == 14 * 14
    # Neighbours are more alike than distant positions.
    likeness = torch.nn.functional.cosine_similarity(grid[7, 7], grid.reshape(-1, 64), dim=-1).view(14, 14)
    assert likeness[7, 7] > likeness[7, 8] > likeness[7, 12] and likeness[8, 7] > likeness[12, 7]


@pytest.mark.parametrize("name", ["convnext_femto", "resnet18"])
def test_mimetic_initialisation_is_for_vits(name):
    with pytest.raises(InputError, match="--init mimetic: is for ViTs"):
        initialize(create_model(name), "mimetic")


def test_unknown_initialisation_is_refused():
    with pytest.raises(InputError, match="--init he.*kaiming"):
        initialize(torch.nn.Linear(1, 1), "he")


# ---------------------------------------------------------------------------------------------------------
# Declarations


@pytest.mark.parametrize("name", DECLARED)
def test_every_pattern_of_an_architecture_matches_keys_of_its_models(declared_shapes, name):
    architecture = DECLARED[name]
    patterns = [pattern for pattern in (architecture.classifier, architecture.head_norm) if pattern is not None]
    for keys in declared_shapes[name]:
        for pattern in (*patterns, *architecture.components.values()):
            assert any(re.search(pattern, key) for key in keys), pattern


@pytest.mark.parametrize("model_name", ["vit_tiny", "convnext_femto", "deit_tiny_distilled_patch16_224", "resnet18"])
def test_classifier_is_what_timm_calls_so(model_name):
    model = create_model(model_name, device="meta")
    declared = {key for key in model.state_dict() if re.search(facts_of(model).architecture.classifier, key)}
    names = model.pretrained_cfg["classifier"]
    expected = {
        f"{name}.{kind}" for name in ([names] if isinstance(names, str) else names) for kind in ("weight", "bias")
    }
    norm = {"head.norm.weight", "head.norm.bias"} if model_name == "convnext_femto" else set()  # as in the release
    assert declared == expected | norm


@pytest.mark.parametrize("name", DECLARED)
def test_no_key_belongs_to_two_components(declared_shapes, name):
    for key in declared_shapes[name][1]:
        owners = [component for component, pattern in DECLARED[name].components.items() if re.search(pattern, key)]
        assert len(owners) <= 1, f"{key}: {owners}"


def test_components_of_vit_leave_out_nothing_but_the_class_token(declared_shapes):
    architecture = DECLARED["vit"]
    patterns = [architecture.classifier, *architecture.components.values()]
    left = [key for key in declared_shapes["vit"][1] if not any(re.search(pattern, key) for pattern in patterns)]
    assert left == ["cls_token"]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("deit_small_distilled_patch16_224", "vit"),
        ("convnextv2_tiny", "convnext"),
        ("vit_base_patch16_siglip_224", "vit"),
    ],
)
def test_other_models_of_timms_class_are_of_its_architecture(name, architecture):
    assert facts_of(create_model(name, device="meta")).architecture is DECLARED[architecture]


@pytest.mark.parametrize(
    ("name", "architecture", "classifier", "components"),
    [
        ("resnet18", "resnet", ["fc.weight", "fc.bias"], {"norm", "patch_embed"}),
        ("mixer_s32_224", "mlpmixer", ["head.weight", "head.bias"], {"mlp", "norm", "patch_embed"}),
        ("beit_base_patch16_224", "beit", ["head.weight", "head.bias"], {"attention", "mlp", "norm", "patch_embed"}),
    ],
)
def test_any_other_model_of_timms_has_the_architecture_of_its_class(name, architecture, classifier, components):
    model = create_model(name, device="meta")
    found = facts_of(model).architecture
    assert found.name == architecture
    assert [key for key in model.state_dict() if re.search(found.classifier, key)] == classifier
    assert {
        c for c, pattern in found.components.items() if any(map(re.compile(pattern).search, model.state_dict()))
    } == components


def test_a_distilled_variant_is_of_the_architecture_of_the_class_it_extends():
    names = ("efficientvim_m1_dist", "efficientvim_m1")
    assert len({facts_of(create_model(name, device="meta")).architecture.name for name in names}) == 1
