"""Projection in models of torchvision and Hugging Face: it does what it does in timm's."""

import copy

import pytest
import torch
import torchvision
import transformers

from architectures import lively
from helpers import assert_same, random
from traces import structure_of
from weight_selection import select_weights
from weight_selection.errors import InputError
from weight_selection.projection import equations
from weight_selection.projection.activation_stats import ActivationStats
from weight_selection.projection.images import Calibration
from weight_selection.projection.stream_sums import find_sums
from weight_selection.projection.traced_model import TracedModel
from weight_selection.sources.timm_models import create_model

SIZES = (32, 2), (16, 1)  # width and heads of the teacher and of the student
IMAGES = random(24, 3, 32, 32, seed=1)
TOKENS = torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(0))


def timm_vit(width, heads):
    options = {"img_size": 32, "patch_size": 8, "num_classes": 7, "depth": 3, "mlp_ratio": 2}
    return create_model("vit_tiny", embed_dim=width, num_heads=heads, **options)


def torchvision_vit(width, heads):
    return torchvision.models.VisionTransformer(32, 8, 3, heads, width, 2 * width, num_classes=7)


def transformers_vit(width, heads):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": heads}
    options = {"image_size": 32, "patch_size": 8, "num_labels": 7, "layer_norm_eps": 1e-6, "num_hidden_layers": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **options))


# The order of timm's tensors in the other libraries: before the layers, and in a layer. Queries, keys and values of
# transformers are thirds of timm's tensors.
ORDER = {
    torchvision_vit: (
        ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"),
        ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
    ),
    transformers_vit: (
        ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
        ("attn.0", "attn.1", "attn.2", "attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2"),
    ),
}


def renamed(weights, build, model):
    """timm's weights in the layout of another library."""
    first, layer = ORDER[build]
    weights = dict(weights)
    for number in range(3):
        for end in ("weight", "bias"):
            for third, value in enumerate(weights[f"blocks.{number}.attn.qkv.{end}"].chunk(3)):
                weights[f"blocks.{number}.attn.{third}.{end}"] = value
    names = [*first, *(f"blocks.{number}.{name}.{end}" for number in range(3) for name in layer for end in ENDS)]
    names += [f"{name}.{end}" for name in ("norm", "head") for end in ENDS]
    keys = list(model.state_dict())
    return {key: weights[name] for key, name in zip(keys, names, strict=True) if name in weights}


ENDS = ("weight", "bias")


@pytest.mark.parametrize("build", ORDER)
@pytest.mark.parametrize("method", ["project", "greedy"])
def test_a_vit_is_a_vit_whatever_library_it_is_of(build, method):
    teacher, student = lively(timm_vit(*SIZES[0])), timm_vit(*SIZES[1])
    options = {"element_selection": method, "calibration": IMAGES, "layer_selection": "uniform"}
    expected = select_weights(teacher, student, **options)
    theirs, ours = build(*SIZES[0]).double().eval(), build(*SIZES[1])
    theirs.load_state_dict(renamed(teacher.state_dict(), build, theirs))
    with torch.no_grad():
        given = theirs(IMAGES)
        torch.testing.assert_close(getattr(given, "logits", given), teacher(IMAGES))
    found = select_weights(theirs, ours, **options)
    assert_same(found, renamed(expected, build, ours), rtol=1e-6, atol=1e-8)


def test_noise_is_normalised_as_the_library_says(capsys):
    for build, mean, std in (
        (torchvision_vit, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (transformers_vit, (0.5,) * 3, (0.5,) * 3),
    ):
        teacher, student = lively(build(*SIZES[0])), build(*SIZES[1])
        images = list(Calibration("noise", 16, None, (3, 32, 32), {"mean": mean, "std": std}, 0))
        options = {"element_selection": "greedy"}
        found = select_weights(teacher, student, calibration="noise", calibration_images=16, **options)
        assert_same(found, select_weights(teacher, student, calibration=images, **options))
        assert f"normalised with mean {mean[0]:g}" in capsys.readouterr().out


def gpt2(width, heads, tied=False):
    sizes = {"n_embd": width, "n_head": heads, "n_layer": 2, "vocab_size": 50, "n_positions": 20}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=tied))


def llama(width, heads, tied=False, keys=None):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "vocab_size": 50}
    sizes["num_key_value_heads"] = keys or heads // 2
    config = transformers.LlamaConfig(intermediate_size=width, num_hidden_layers=2, tie_word_embeddings=tied, **sizes)
    return transformers.LlamaForCausalLM(config)


def llama_of_two_keys(width, heads):
    return llama(width, heads, keys=2)


def dinov3(width, heads, tied=False):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": heads}
    config = transformers.DINOv3ViTConfig(image_size=32, patch_size=8, num_hidden_layers=2, **sizes)
    return transformers.DINOv3ViTModel(config)


def nearness(teacher, student, first, batch):
    """How much of what the teacher gives, but for a linear map, the student with its first weights gives: 0 to 1."""
    student = copy.deepcopy(student).double().eval()
    student.load_state_dict(first, strict=False)
    with torch.no_grad():
        theirs, ours = (model(**batch)[0].flatten(0, -2) for model in (teacher, student))
    theirs, ours = (x - x.mean(0) for x in (theirs, ours))
    rest = theirs - ours @ torch.linalg.lstsq(ours, theirs, driver="gelsd").solution
    return 1 - (rest.norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    ("build", "large", "small"),
    [
        (gpt2, (32, 4), (16, 2)),
        (llama, (64, 8), (32, 4)),
        (llama, (64, 4), (32, 2)),  # one key of two
        (llama_of_two_keys, (64, 8), (32, 4)),  # two queries of four for each
        (dinov3, (64, 4), (32, 2)),
    ],
)
def test_projected_weights_are_nearer_to_the_teacher_than_selected_ones(build, large, small):
    teacher, student = lively(build(*large)), build(*small)
    batch = {"pixel_values": IMAGES} if build is dinov3 else {"input_ids": TOKENS}
    nearnesses = {}
    for method in ("uniform", "greedy", "project"):
        calibration = {} if method == "uniform" else {"calibration": [batch]}
        first = select_weights(teacher, student, element_selection=method, classifier=(), **calibration)
        nearnesses[method] = nearness(teacher, student, first, batch)
    assert min(nearnesses["greedy"], nearnesses["project"]) > nearnesses["uniform"] + 0.03, nearnesses


def test_a_stream_may_be_so_small_that_the_eps_of_its_norms_counts():
    teacher = gpt2(32, 4)
    for embedding in (teacher.transformer.wte, teacher.transformer.wpe):
        embedding.weight.data.mul_(0.25)
    options = {"element_selection": "project", "classifier": (), "calibration": [{"input_ids": TOKENS}]}
    first = select_weights(teacher, gpt2(16, 2), **options)
    assert all(value.isfinite().all() for value in first.values())


def in_more_neurons(student, teacher):
    """A LLaMA that computes what a smaller one does, with its stream along no coordinates: n = V RMS(s) / sqrt(2)."""
    turn = torch.linalg.qr(random(32, 16)).Q
    small, large = student.state_dict(), {key: torch.zeros_like(value) for key, value in teacher.state_dict().items()}
    for key, value in small.items():
        layer, _, name = key.removesuffix(".weight").rpartition(".")
        if "norm" in key:
            large[key].fill_(0.5**0.5)  # twice the neurons, of the same energy
            continue
        norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm", "": "model.norm"}
        parent, _, part = layer.rpartition(".")
        norm = f"{parent}.{norms[part]}".lstrip(".") + ".weight" if part in norms else None
        if name in ("o_proj", "down_proj"):
            value = turn @ value
        else:
            value = (value if name == "embed_tokens" else value * small[norm]) @ turn.T
        large[key][: len(value), : value.shape[1]] = value
    return large


def test_of_rms_norms_a_stream_along_no_coordinates_is_recovered_by_a_rotation(monkeypatch):
    monkeypatch.setattr(equations, "RIDGE", 1e-9)
    student, teacher = lively(llama(16, 4)), lively(llama(32, 8))
    for module in (*teacher.modules(), *student.modules()):
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-12
    teacher.load_state_dict(in_more_neurons(student, teacher))
    batch, errors = {"input_ids": TOKENS}, {}
    with torch.no_grad():
        expected = student(**batch).logits
        torch.testing.assert_close(teacher(**batch).logits, expected, rtol=1e-5, atol=1e-5)  # norms in float32
        found = copy.deepcopy(student)
        for method in ("project", "greedy"):
            options = {"element_selection": method, "calibration": [batch], "classifier": ()}
            found.load_state_dict(select_weights(teacher, student, **options))
            errors[method] = ((found(**batch).logits - expected).norm() / expected.norm()).item()
    assert errors["project"] < 1e-4 < 1e-2 < errors["greedy"], errors


def test_sums_are_found_between_rms_norms_that_a_library_writes_out():
    traced = TracedModel.of(model := lively(llama(32, 4)), structure_of(model, "model"))
    found = find_sums(traced, {"input_ids": TOKENS})
    layers = [f"model.layers.{layer}." for layer in range(2)]
    assert found.keys() == {
        layer + name for layer in layers for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    }
    for one in found.values():
        torch.testing.assert_close(one.gain, torch.ones_like(one.gain), rtol=1e-4, atol=1e-4)


def test_what_attention_of_pytorch_and_transposed_weights_take_is_seen():
    vit, language = lively(torchvision_vit(*SIZES[0])), lively(gpt2(32, 4))
    block, layer = vit.encoder.layers[1], language.transformer.h[1]
    cases = [
        (vit, IMAGES, block.ln_1, "encoder.layers.encoder_layer_1.self_attention.in_proj_weight"),
        (language, {"input_ids": TOKENS}, layer.ln_1, "transformer.h.1.attn.c_attn.weight"),
    ]
    for model, batch, norm, key in cases:
        taken = []
        with torch.no_grad():
            stats = ActivationStats(TracedModel.of(model, structure_of(model, "teacher")), [batch])
            hook = norm.register_forward_hook(lambda *given, taken=taken: taken.append(given[-1].flatten(0, 1)))
            stats.teacher.run(batch)
        hook.remove()
        torch.testing.assert_close(stats.moments[key].covariance, torch.cov(taken[0].T, correction=0))
        assert stats.moments[key].count == len(taken[0])


def test_what_cannot_be_calibrated_or_rotated_is_refused():
    options = {"element_selection": "project", "classifier": ()}
    with pytest.raises(InputError, match="a LlamaForCausalLM takes more than images; calibrate it in Python"):
        select_weights(llama(64, 8), llama(32, 4), calibration="noise", **options)
    batches = [{"input_ids": TOKENS}]
    with pytest.raises(InputError, match="is tied to another tensor"):
        select_weights(gpt2(32, 4, True), gpt2(16, 2, True), calibration=batches, **options)
    with pytest.raises(InputError, match="cannot take batches of pixels"):
        select_weights(gpt2(32, 4), gpt2(16, 2), calibration=[{"pixels": TOKENS}], **options)
    with pytest.raises(InputError, match="cannot be gone through three times"):
        select_weights(gpt2(32, 4), gpt2(16, 2), calibration=iter(batches), **options)
