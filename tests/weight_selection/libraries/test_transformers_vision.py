"""Hugging Face's models of images: proofs, heads and poolers, positions, and the same tensors as from timm's ViT."""

import re

import pytest
import torch
import transformers
from timm.layers import resample_abs_pos_embed

from helpers import assert_same
from huggingface_layout import from_timm, in_layout
from proofs import check_consistent, check_hidden, structures
from weight_selection import InputError, select_weights
from weight_selection.apply import apply_plan
from weight_selection.plan import make_plan
from weight_selection.report import summary
from weight_selection.sources.facts import facts_of
from weight_selection.sources.timm_models import create_model


def vit(heads, layers):
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "intermediate_size": 12 * heads}
    return sizes | {"num_hidden_layers": layers, "image_size": 16, "patch_size": 8}


def stages(heads, layers):
    return {"hidden_sizes": [4 * heads, 6 * heads], "depths": [1, layers], "image_size": 32}


def swin(heads, layers):
    sizes = {"embed_dim": 8 * heads, "num_heads": (heads, 2 * heads), "depths": (2, layers)}
    return sizes | {"image_size": 32, "patch_size": 4, "window_size": 4}


def siglip(heads, layers):
    sizes = {key: value for key, value in vit(heads, layers).items() if key not in ("image_size", "patch_size")}
    words = {"vocab_size": 30, "max_position_embeddings": 8, "projection_size": 8 * heads}
    return {"vision_config": vit(heads, layers), "text_config": sizes | words}


# name: (classes of model and config, values of both, sizes of (heads, layers)). The teacher has 4 heads and 2 layers,
# the student 2 heads and 1 layer.
REGISTERS = {"num_register_tokens": 4}
BIASES = {"use_relative_position_bias": True, "use_mask_token": True, "layer_scale_init_value": 0.1}
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", {}, vit),
    "vit_masked": ("ViTForMaskedImageModeling", "ViTConfig", {"encoder_stride": 8}, vit),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}, vit),
    "beit": ("BeitForImageClassification", "BeitConfig", BIASES, vit),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2}, vit),
    "dinov2_registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        REGISTERS | {"mlp_ratio": 2, "use_swiglu_ffn": True},
        vit,
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", REGISTERS, vit),
    "dinov3_gated": ("DINOv3ViTModel", "DINOv3ViTConfig", REGISTERS | {"use_gated_mlp": True}, vit),
    "dinov3_convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", {}, stages),
    "siglip": ("SiglipModel", "SiglipConfig", {}, siglip),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", {}, vit),
    "swin": ("SwinForImageClassification", "SwinConfig", {}, swin),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {"num_stages": 2}, stages),
}
TEACHER, STUDENT = (4, 2), (2, 1)


def build(name, both, model=None, sizes=None, **changes):
    """A model of a row of MODELS, or another class of its kind: ``both`` are its heads and layers."""
    cls, config, values, of = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**values | (sizes or of)(*both) | changes)
    return getattr(transformers, model or cls)(config).eval()


def pair(name, teacher=None, student=None):
    """The teacher and the student of a row of MODELS, or of other classes of its kind."""
    return build(name, TEACHER, teacher), build(name, STUDENT, student)


def inputs_of(structure):
    """Random inputs of a model, in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, value in structure.facts.inputs.items():
        if name == "pixel_values":
            inputs[name] = torch.randn(2, *value.shape[1:], dtype=torch.float64, generator=generator)
        elif name == "input_ids":
            inputs[name] = torch.randint(30, (2, 8), generator=generator)
    return inputs


def output(given, width):
    """The first neurons of what a model gives: those of a teacher that hides a student are the student's."""
    kinds = "logits_per_image", "logits", "reconstruction", "pooler_output"
    return given[next(kind for kind in kinds if kind in given)][..., :width]


@pytest.mark.parametrize("name", MODELS)
def test_a_hidden_student_is_what_the_teacher_computes_and_all_that_meets_keeps_its_neurons(name):
    teacher, student = pair(name)
    both = structures(teacher, student)
    check_consistent(teacher, both)
    width = getattr(student.config, "hidden_sizes", [16])[-1]
    check_hidden(teacher, student, both, inputs_of(both[1]), output=lambda given: output(given, width))


def test_a_mask_token_that_no_forward_pass_uses_stays_the_students_own_and_is_said():
    plan = make_plan(*pair("dinov2"))
    assert summary(plan).endswith("2 classifier, 1 unused")
    assert "dinov2.embeddings.mask_token" in plan.left_out


# ---------------------------------------------------------------------------------------------------------
# Heads and base models


CLASSIFIERS = {
    "ViTForImageClassification": r"^(classifier)\.",
    "ViTForMaskedImageModeling": None,
    "DeiTForImageClassificationWithTeacher": r"^(cls_classifier|distillation_classifier)\.",
    "BertForSequenceClassification": r"^(classifier)\.",
    "BertForMaskedLM": None,
    "BertForNextSentencePrediction": r"^(cls)\.",
    "RobertaForQuestionAnswering": r"^(qa_outputs)\.",
    "DistilBertForSequenceClassification": r"^(pre_classifier|classifier)\.",
    "LlamaForSequenceClassification": r"^(score)\.",
    "LlamaForCausalLM": None,
    "WhisperForAudioClassification": r"^(projector|classifier)\.",
    "CLIPForImageClassification": r"^(classifier)\.",
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_heads_of_classes_are_the_classifier_and_those_of_words_and_pixels_are_not(name):
    model = getattr(transformers, name)
    kind = model.config_class(num_labels=3)
    for config in (kind, *(getattr(kind, part) for part in ("text_config", "vision_config") if hasattr(kind, part))):
        for key in config.to_dict():
            if key in ("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers"):
                setattr(config, key, 1)
    with torch.device("meta"):
        model = model(kind)
    classifier = facts_of(model).architecture.classifier
    inside = {key.split(".")[0] for key in model.state_dict() if re.search(classifier, key)}
    assert inside == set(re.findall(r"\w+", CLASSIFIERS[name] or ""))


@pytest.mark.parametrize(
    ("name", "teacher", "student", "left"),
    [
        ("vit", "ViTModel", "ViTForImageClassification", "pooler.dense"),
        ("vit", "ViTForImageClassification", "ViTForImageClassification", None),
        (
            "vit_masked",
            "ViTForMaskedImageModeling",
            "ViTForImageClassification",
            "vit.embeddings.mask_token, decoder.0",
        ),
        ("dinov2", "Dinov2Model", "Dinov2ForImageClassification", None),
        ("clip_vision", "CLIPVisionModelWithProjection", "CLIPVisionModel", "visual_projection"),
    ],
)
def test_a_base_models_prefix_is_bridged_and_what_only_its_task_needs_is_left_behind(name, teacher, student, left):
    teacher, student = pair(name, teacher, student)
    plan = make_plan(teacher, student)
    weights, own = apply_plan(plan, teacher.state_dict()), student.base_model.state_dict()
    prefix = "" if student.base_model is student else f"{student.base_model_prefix}."
    assert {key for key in own if "mask_token" not in key} == {key.removeprefix(prefix) for key in weights}
    theirs = getattr(teacher, teacher.base_model_prefix, teacher).state_dict()
    assert_same({"bias": weights[f"{prefix}{norm(name)}.bias"]}, {"bias": theirs[f"{norm(name)}.bias"][::2]})
    words = summary(plan)
    assert words.endswith(f"; the student has no place for the teacher's {left}") if left else "no place" not in words


def norm(name):
    return "post_layernorm" if name == "clip_vision" else "layernorm"


def test_the_vision_tower_of_a_whole_model_is_given_by_itself():
    teacher, student = pair("siglip", student="SiglipForImageClassification")
    with pytest.raises(InputError, match="logit_scale: the student has no such tensor"):
        make_plan(teacher, student)
    weights = select_weights(teacher.vision_model, student)
    assert set(student.state_dict()) - set(weights) == {"classifier.weight", "classifier.bias"}


def test_a_pooler_that_the_teacher_lacks_is_refused_with_what_to_do():
    teacher, student = pair("vit", student="ViTModel")
    with pytest.raises(InputError, match=r"no vit.pooler.dense.weight to .*none \(add_pooling_layer=False\)"):
        select_weights(teacher, student)
    weights = select_weights(teacher, student, classifier=("pooler",))
    assert set(student.state_dict()) - set(weights) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert weights.keys() == transformers.ViTModel(student.config, add_pooling_layer=False).state_dict().keys()


# ---------------------------------------------------------------------------------------------------------
# Components and positions


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("vit", {"attention": 8, "norm": 6, "mlp": 4, "patch_embed": 2, "pos_embed": 1}),
        ("swin", {"attention": 27, "norm": 18, "mlp": 12, "patch_embed": 2}),
        ("convnext", {"norm": 10, "mlp": 8, "patch_embed": 2}),
    ],
)
def test_components_are_found_in_a_model(name, counts):
    model = build(name, STUDENT)
    found = {part: keys_of(model, pattern) for part, pattern in facts_of(model).architecture.components.items()}
    assert {part: len(keys) for part, keys in found.items()} == counts


def test_a_component_that_is_excluded_stays_the_students_own():
    teacher, student = pair("vit")
    components = facts_of(student).architecture.components
    kept = {key for part in ("norm", "mlp") for key in keys_of(student, components[part])}
    weights = select_weights(teacher, student, exclude=["norm", "mlp"])
    assert weights.keys() == student.state_dict().keys() - kept - {"classifier.weight", "classifier.bias"}


def keys_of(model, pattern):
    return [key for key in model.state_dict() if re.search(pattern, key)]


@pytest.mark.parametrize(
    ("name", "key"), [("vit", "position_embeddings"), ("clip_vision", "position_embedding.weight")]
)
def test_positions_of_a_student_for_smaller_images_are_resampled(name, key):
    teacher, student = build(name, TEACHER, image_size=32), build(name, STUDENT)
    key = facts_of(student).prefix + f"embeddings.{key}"
    theirs = teacher.state_dict()[key].reshape(1, 17, 32)
    expected = resample_abs_pos_embed(theirs, [2, 2], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(select_weights(teacher, student)[key].reshape(1, 5, 16), expected[..., ::2])


def test_pixels_that_a_decoder_gives_are_never_subsampled():
    teacher, student = build("vit_masked", TEACHER), build("vit_masked", STUDENT, encoder_stride=4)
    with pytest.raises(InputError, match=r"decoder.0.weight, dimension 0: teacher's size 192, student's 48: these are"):
        make_plan(teacher, student)


# ---------------------------------------------------------------------------------------------------------
# timm's ViT in transformers' layout


@pytest.mark.parametrize(
    "options",
    [{}, {"element_selection": "random", "layer_selection": "last_n", "include_head": True}],
    ids=["default", "random"],
)
def test_a_vit_in_transformers_layout_gets_the_tensors_that_timms_gets(options):
    sizes = {"img_size": 16, "patch_size": 8, "num_classes": 5}
    large, small = ({"embed_dim": 8 * heads, "num_heads": heads, "depth": heads // 2} for heads in (4, 2))
    teacher, student = create_model("vit_tiny", **sizes, **large), create_model("vit_tiny", **sizes, **small)
    ours, theirs = from_timm(teacher), from_timm(student)
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(ours(images).logits, teacher.eval()(images), rtol=1e-4, atol=1e-5)
    found, expected = select_weights(ours, theirs, **options), in_layout(select_weights(teacher, student, **options))
    assert found.keys() == expected.keys()
    assert_same(found, expected)


def test_the_classes_of_a_segmentation_are_the_students_own_if_they_differ():
    sizes = {"image_size": 32, "depths": [1], "num_encoder_blocks": 1, "num_attention_heads": [1], "sr_ratios": [1]}
    sizes |= {"mlp_ratios": [2], "patch_sizes": [7], "strides": [4]}

    def segmenter(classes, width):
        config = transformers.SegformerConfig(
            num_labels=classes, hidden_sizes=[width], decoder_hidden_size=width, **sizes
        )
        return transformers.SegformerForSemanticSegmentation(config)

    for classes in (3, 7):
        student = segmenter(classes, 8)
        own = student.state_dict().keys() - select_weights(segmenter(5, 16), student).keys()
        assert own == {"decode_head.classifier.weight", "decode_head.classifier.bias"}


def test_the_classes_of_a_detector_are_the_students_own_if_they_differ():
    def detector(classes, width):
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": width, "hidden_size": width}
        config = transformers.YolosConfig(num_labels=classes, image_size=[16, 16], patch_size=8, **sizes)
        return transformers.YolosForObjectDetection(config)

    for classes, differ in ((4, True), (9, False)):
        student = detector(classes, 8)
        own = student.state_dict().keys() - select_weights(detector(9, 16), student).keys()
        head = "class_labels_classifier.layers.2"  # the layers before it are selected, as those of the boxes are
        assert own == ({f"{head}.weight", f"{head}.bias"} if differ else set())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Vivit", {"image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8]}),
        ("Timesformer", {"image_size": 16, "num_frames": 2, "patch_size": 8}),
        ("AST", {"patch_size": 8, "num_mel_bins": 16, "max_length": 24, "frequency_stride": 8, "time_stride": 8}),
    ],
)
def test_videos_and_spectrograms_have_the_sizes_of_the_config(name, sizes):
    model, config = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    teacher, student = (model(config(hidden_size=width, **sizes)) for width in (16, 8))
    both = structures(teacher, student)
    check_consistent(teacher, both)
    assert len(select_weights(teacher, student)) == len(student.state_dict())


def test_the_sinusoids_of_videomae_are_selected_from_a_buffer():
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 2, "num_hidden_layers": 1, "num_attention_heads": 2}
    pair = [transformers.VideoMAEModel(transformers.VideoMAEConfig(hidden_size=width, **sizes)) for width in (16, 8)]
    with pytest.raises(InputError, match="such as sinusoids of positions; keep these in a persistent buffer"):
        select_weights(*pair)
    for model in pair:
        places = vars(model.embeddings).pop("position_embeddings")
        model.embeddings.register_buffer("position_embeddings", places)
    places = pair[0].embeddings.position_embeddings
    assert torch.equal(select_weights(*pair)["embeddings.position_embeddings"], places[..., ::2])
