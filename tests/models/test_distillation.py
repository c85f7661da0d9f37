"""Distillation: the losses of equations 1 and 2, what the teacher sees, what is trained and kept."""

import argparse
import math

import pytest
import torch

import main
from helpers import assert_same, differ, read_checkpoint, read_log
from models.distillation import Loss, Teacher, build_teacher
from training.options import parse_args
from weight_selection.errors import InputError
from weight_selection.sources.teachers import normalization
from weight_selection.sources.timm_models import create_model

TEACHER = "--teacher vit_tiny --teacher_kwargs embed_dim=48 depth=2 num_heads=3 patch_size=4"


class Fixed(torch.nn.Module):
    """Gives the same output for any input, and notes the input."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        self.seen = images
        return self.output

    def forward_features(self, images):
        return self(images)

    def forward_head(self, features, pre_logits):
        assert pre_logits
        return features


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory, image_folder):
    """Checkpoint of a ViT trained by main.py for two epochs, on the images of ``image_folder``."""
    directory = tmp_path_factory.mktemp("teacher")
    model = "--model vit_tiny --model_kwargs embed_dim=48 depth=2 num_heads=3 patch_size=4 --input_size 16"
    run = "--epochs 1 --warmup_steps 0 --batch_size 16 --num_workers 0 --device cpu --data_set image_folder"
    main.main(f"{model} {run} --data_path {image_folder} --output_dir {directory}".split())
    return directory / "checkpoint-0.pth"


def identity_teacher(output, features):
    return Teacher(Fixed(output), *normalization(True), *normalization(True), features)


# ---------------------------------------------------------------------------------------------------------
# Losses


def test_logit_loss_is_equation_1():
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    total = 0.0
    for row in range(4):
        p_s = [math.exp(v) / sum(map(math.exp, student[row].tolist())) for v in student[row].tolist()]
        p_t = [math.exp(v) / sum(map(math.exp, teacher[row].tolist())) for v in teacher[row].tolist()]
        total += -math.log(p_s[targets[row]]) + 0.7 * sum(t * math.log(t / s) for t, s in zip(p_t, p_s, strict=True))
    loss = Loss(torch.nn.CrossEntropyLoss(), identity_teacher(teacher, features=False), alpha=0.7)
    assert loss(torch.zeros(4, 3, 2, 2), student, targets)[0].item() == pytest.approx(total / 4, rel=1e-5)


def test_logit_loss_is_the_labels_alone_when_student_and_teacher_agree():
    logits, targets = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    criterion = torch.nn.CrossEntropyLoss()
    loss = Loss(criterion, identity_teacher(logits, features=False), alpha=1.0)
    torch.testing.assert_close(loss(torch.zeros(4, 3, 2, 2), logits, targets)[0], criterion(logits, targets))


def test_feature_loss_is_equation_2():
    torch.manual_seed(0)
    logits, projected, features = torch.randn(4, 5), torch.randn(4, 7), torch.randn(4, 7)
    targets, criterion = torch.tensor([0, 1, 2, 3]), torch.nn.CrossEntropyLoss()
    loss = Loss(criterion, identity_teacher(features, features=True), alpha=2.0)
    distance = sum(abs(a - b) for a, b in zip(projected.flatten().tolist(), features.flatten().tolist(), strict=True))
    expected = criterion(logits, targets).item() + 2.0 * distance / 28
    assert loss(torch.zeros(4, 3, 2, 2), (logits, projected), targets)[0].item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------
# The teacher


def test_teacher_sees_the_same_images_under_its_own_normalisation():
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in normalization(True))
    teacher = Teacher(Fixed(torch.zeros(2, 5)), (0.5, 0.4, 0.3), (0.5, 0.2, 0.1), *normalization(True), False)
    teacher((pixels - mean) / std)
    expected = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)) / torch.tensor([0.5, 0.2, 0.1]).view(-1, 1, 1)
    torch.testing.assert_close(teacher.model.seen, expected)


def test_teacher_stays_in_evaluation_mode_and_frozen():
    teacher = Teacher(create_model("test_vit", drop_rate=0.5), *normalization(True), *normalization(True), False)
    torch.nn.Sequential(teacher).train()
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(teacher(images), teacher(images)) and not teacher(images).requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_features_are_what_the_classifier_sees():
    for name in ("test_vit", "test_convnext"):
        model = create_model(name, num_classes=4).eval()
        teacher = Teacher(model, *normalization(True), *normalization(True), features=True)
        images = torch.randn(2, 3, 160, 160)
        with torch.no_grad():
            torch.testing.assert_close(model.get_classifier()(teacher(images)), model(images))


def options(*words):
    return parse_args([word for text in words for word in str(text).split()])


def small(teacher_file, *words):
    return options("--input_size 16", TEACHER, f"--teacher_path {teacher_file}", *words)


def test_teacher_has_the_weights_of_its_file(teacher_file):
    trained = read_checkpoint(teacher_file.parent, 0)["model"]
    assert_same(dict(build_teacher(small(teacher_file, "--distillation logit"), 3).model.state_dict()), trained)
    features = build_teacher(small(teacher_file, "--distillation feature"), 99).model.state_dict()
    assert_same(dict(features), {key: value for key, value in trained.items() if not key.startswith("head.")})


def test_a_teacher_is_normalised_as_its_training_was(teacher_file, tmp_path):
    """By timm's configuration (here 0.5 and 0.5), unless the file is a checkpoint of main.py, which says itself."""
    ours = build_teacher(small(teacher_file, "--distillation logit"), 3)
    assert ours.scale.flatten().tolist() == [1, 1, 1] and not ours.shift.any()
    torch.save(read_checkpoint(teacher_file.parent, 0)["model"], tmp_path / "plain.pth")
    plain = build_teacher(small(tmp_path / "plain.pth", "--distillation logit"), 3)
    assert plain.scale.flatten().tolist() == pytest.approx([0.458, 0.448, 0.45], abs=1e-4)
    assert plain.shift.flatten().tolist() == pytest.approx([-0.03, -0.088, -0.188], abs=1e-4)


def test_a_teacher_of_another_training_script(teacher_file, tmp_path):
    """Most keep their options in a Namespace, which says nothing to us; the weights are read all the same."""
    weights = read_checkpoint(teacher_file.parent, 0)["model"]
    torch.save({"model": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "other.pth")
    teacher = build_teacher(small(tmp_path / "other.pth", "--distillation feature"), 3)
    assert torch.equal(teacher.model.blocks[1].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])
    assert teacher.scale[0].item() == pytest.approx(0.458)


def test_a_convnext_teacher_keeps_its_head_norm(tmp_path):
    model = create_model("test_convnext", num_classes=5)
    torch.nn.init.normal_(model.head.norm.weight)
    torch.save(model.state_dict(), tmp_path / "t.pth")
    args = options(f"--input_size 64 --distillation feature --teacher test_convnext --teacher_path {tmp_path}/t.pth")
    assert torch.equal(build_teacher(args, 3).model.head.norm.weight, model.head.norm.weight)


@pytest.mark.parametrize(
    ("words", "classes", "named"),
    [
        ("--distillation logit", 4, ["--teacher_path", "teacher of 4 classes", "head.weight is (3, 48)"]),
        ("--distillation feature --teacher_kwargs embed_dim=96 num_heads=3 patch_size=4", 3, ["--teacher_path"]),
        ("--distillation feature --teacher vit_tinny", 3, ["--teacher vit_tinny", "vit_tiny"]),
        (
            "--distillation feature --teacher resnet18 --teacher_kwargs",
            3,
            ["--teacher_path", "conv1.weight is missing"],
        ),
        ("--distillation feature --teacher_path nowhere.pth", 3, ["--teacher_path nowhere.pth: no such file"]),
    ],
)
def test_unfitting_teachers_are_refused(teacher_file, words, classes, named):
    with pytest.raises(InputError) as refusal:
        build_teacher(small(teacher_file, words), classes)
    assert all(word in str(refusal.value) for word in named), refusal.value


def test_a_teacher_without_published_weights_needs_a_file():
    with pytest.raises(InputError, match="--teacher vit_small_patch8_224.*give --teacher_path FILE"):
        build_teacher(options("--distillation feature --teacher vit_small_patch8_224"), 3)


def test_published_logits_of_another_data_set_are_refused(monkeypatch):
    monkeypatch.setattr("models.distillation.create_pretrained", lambda name, kwargs, *_: create_model(name, **kwargs))
    with pytest.raises(InputError, match="--teacher test_vit: has 1000 classes, IMNET has 3"):
        build_teacher(options("--distillation logit --input_size 160 --teacher test_vit"), 3)


# ---------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_distillation_trains_the_student_and_keeps_only_it(kind, train, teacher_file, tmp_path):
    distill = f"{TEACHER} --teacher_path {teacher_file} --distillation {kind}"
    train(f"--output_dir {tmp_path}/plain")
    train(f"{distill} --output_dir {tmp_path}/none --distillation_alpha 0")
    train(f"{distill} --output_dir {tmp_path}/one")
    plain, none, one = (read_checkpoint(tmp_path / name, 1)["model"] for name in ("plain", "none", "one"))
    assert one.keys() == plain.keys()
    assert differ(plain, one)
    assert_same(none, plain)  # with alpha 0 the labels alone drive the student
    plain, none, one = (read_log(tmp_path / name)[0] for name in ("plain", "none", "one"))
    assert "train_distance" not in plain and none["train_loss"] == plain["train_loss"]
    assert 0 < one["train_distance"] < none["train_distance"]


def test_a_refused_teacher_leaves_nothing_behind(train, tmp_path):
    """Or the corrected command would find a run with other options."""
    with pytest.raises(InputError, match="--teacher_path nowhere.pth"):
        train(f"{TEACHER} --teacher_path nowhere.pth --distillation feature --output_dir {tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_the_projector_is_trained_too(train, teacher_file, tmp_path):
    train(f"{TEACHER} --teacher_path {teacher_file} --distillation feature --output_dir {tmp_path}")
    first, second = (read_checkpoint(tmp_path, epoch)["projector"] for epoch in (0, 1))
    assert differ(first, second)


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_an_interrupted_distillation_ends_like_an_uninterrupted_one(kind, train, interrupted, teacher_file, tmp_path):
    distill = f"{TEACHER} --teacher_path {teacher_file} --distillation {kind} --model_ema true"
    train(f"{distill} --output_dir {tmp_path}/whole")
    interrupted(1, f"{distill} --output_dir {tmp_path}/parts")
    train(f"{distill} --output_dir {tmp_path}/parts")
    whole, parts = (read_checkpoint(tmp_path / name, 1) for name in ("whole", "parts"))
    assert_same(parts["model"], whole["model"])
    assert_same(parts["model_ema"], whole["model_ema"])
    if kind == "feature":
        assert_same(parts["projector"], whole["projector"])


def test_gradient_norm_and_clipping_cover_the_projector(train, teacher_file, tmp_path):
    """With a huge alpha the projector's gradient is nearly all of it."""
    distill = f"{TEACHER} --teacher_path {teacher_file} --distillation feature --distillation_alpha 1e4"
    sgd = "--opt momentum --momentum 0 --weight_decay 0 --lr 1 --min_lr 1 --clip_grad 1e-4"
    train(f"{distill} {sgd} --output_dir {tmp_path}")
    first, second = (read_checkpoint(tmp_path, epoch)["projector"] for epoch in (0, 1))
    moved = sum(((second[key] - first[key]) ** 2).sum() for key in first) ** 0.5
    assert 0 < moved <= 3 * 1.001e-4  # three steps of at most the clipped norm


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distillation logit", "--distillation logit: name the model to learn from with --teacher"),
        ("--teacher vit_tiny", "--teacher vit_tiny: has no effect with --distillation none"),
        ("--distillation_alpha 2", "--distillation_alpha 2.0: has no effect with --distillation none"),
        (
            "--distillation feature --teacher x --distillation_alpha -1",
            "--distillation_alpha -1.0: give a number from 0",
        ),
        (
            "--distillation feature --teacher x --teacher_kwargs num_classes=3",
            "num_classes=3: leave it out; --data_set",
        ),
        ("--distillation feature --teacher x --linear_probe true", "--distillation feature: features are frozen"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, message):
    with pytest.raises(InputError) as refusal:
        parse_args(words.split())
    assert message in str(refusal.value)
