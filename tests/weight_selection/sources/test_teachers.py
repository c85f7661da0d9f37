"""The paper's teachers by name: their weights on the hub, and the files that their publishers distribute."""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import safetensors.torch
import torch

from helpers import (
    assert_same,
    jax_names,
    meta,
    prefixed,
    random_weights,
    read,
    release_names,
    save_torchscript,
    words,
    written,
)
from weight_selection.cli import main as select_main
from weight_selection.plan import make_plan
from weight_selection.report import summary
from weight_selection.sources.initial_weights import load_initial
from weight_selection.sources.timm_models import create_model

PAIRS = [
    ("vit_small_patch16_224.augreg_in21k", "vit_tiny"),
    ("vit_base_patch16_224.augreg_in21k", "vit_tiny"),
    ("vit_large_patch16_224.augreg_in21k", "vit_tiny"),
    ("vit_large_patch16_224.augreg_in21k", "vit_small"),
    ("vit_small_patch16_224.augreg_in21k", "vit_a"),
    ("vit_tiny_patch16_224.augreg_in21k", "vit_a"),
    ("convnext_tiny.fb_in22k", "convnext_femto"),
    ("deit_small_patch16_224.fb_in1k", "vit_tiny"),
    ("vit_base_patch16_clip_224.openai", "vit_tiny_clip"),
    ("vit_base_patch16_clip_quickgelu_224.openai", "vit_tiny_clip"),
    ("vit_base_patch16_224.mae", "vit_tiny"),
    ("vit_base_patch16_224.dino", "vit_tiny"),
]
IN21K, CONVNEXT, DEIT = PAIRS[0][0], "convnext_tiny.fb_in22k", "deit_small_patch16_224.fb_in1k"
CLIP, MAE, DINO = "vit_base_patch16_clip_224.openai", "vit_base_patch16_224.mae", "vit_base_patch16_224.dino"
HEADS = {
    "vit": ["head.weight", "head.bias"],
    "convnext": ["head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"],
}

LARGE = {
    "vit": {"embed_dim": 64, "depth": 3, "num_heads": 4, "img_size": 32},
    "convnext": {"depths": (2, 1, 3, 1), "dims": (8, 16, 24, 32)},
}
SMALL = {
    "vit": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32},
    "convnext": {"depths": (1, 1, 2, 1), "dims": (4, 8, 12, 16)},
}


def architecture(name):
    return "convnext" if name.startswith("convnext") else "vit"


def command(teacher, student, output, *more, large=(), small=()):
    """Words of the command line for a small version of a pair; ``large`` and ``small`` add to the models' arguments."""
    named = ["--pretrained_model", teacher, "--teacher_kwargs", *words({**LARGE[architecture(teacher)], **dict(large)})]
    named += ["--student", student, "--student_kwargs", *words({**SMALL[architecture(student)], **dict(small)})]
    return [*named, "--output_dir", output, *more]


def weights_of(teacher, **changes):
    return random_weights(meta(teacher, **{**LARGE[architecture(teacher)], **changes}))


def halved(weights, student, **changes):
    """A student of half the width: every second neuron of everything but classes, positions, pixels and tokens."""
    out = {}
    for key, value in meta(student, **{**SMALL[architecture(student)], **changes}).state_dict().items():
        if key in HEADS[architecture(student)]:
            continue
        array = weights[key].numpy()
        for axis, size in enumerate(value.shape):
            if array.shape[axis] == size:
                continue
            assert array.shape[axis] == 2 * size
            # Counted from 0, the neurons 0, 2, 4, ...: in q, k and v too, whose parts all begin at an even number.
            array = array.take([2 * neuron for neuron in range(size)], axis=axis)
        out[key] = torch.from_numpy(array.copy())
    return out


def assert_initialises(path, student, expected, **changes):
    """The file holds these tensors; the student that loads it has them and its own classifier."""
    assert_same(read(path), expected)
    model = create_model(student, **{**SMALL[architecture(student)], **changes})
    assert load_initial(model, path, "--initialize") == HEADS[architecture(student)]
    loaded = model.state_dict()
    assert_same({key: loaded[key] for key in expected}, {key: value.float() for key, value in expected.items()})


# ---------------------------------------------------------------------------------------------------------
# Plans at full size


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_full_size_plans_cover_every_key_and_lose_nothing(teacher, student):
    teacher, student = meta(teacher), meta(student)
    plan = make_plan(teacher, student)
    head = [key for key in student.state_dict() if key.startswith("head.")]
    assert {entry.key: entry.shape for entry in plan.entries} == {
        k: tuple(v.shape) for k, v in student.state_dict().items()
    }
    assert [entry.key for entry in plan.entries if entry.role != "selected"] == head
    assert {entry.role for entry in plan.entries} == {"selected", "classifier"}
    outside = {key for key in teacher.state_dict() if not key.startswith(("blocks.", "stages."))}
    sources = {entry.teacher_key for entry in plan.entries}
    assert [key for key in outside - sources if not key.startswith("head.")] == []
    first = {key for key in teacher.state_dict() if re.match(r"blocks\.0\.|stages\.\d\.(blocks\.0|downsample)\.", key)}
    assert first <= sources
    assert summary(plan) == f"{len(plan.entries) - len(head)} selected, {len(head)} classifier"


@pytest.mark.parametrize(("teacher", "student"), [(IN21K, "vit_tiny"), (CONVNEXT, "convnext_femto")])
def test_dry_runs_need_only_the_names(teacher, student, cli, capsys):
    named = ["--pretrained_model", teacher, "--student", student, "--dry_run"]
    assert cli(select_main, *named) is None
    classifier = len(HEADS[architecture(student)])
    selected = len(meta(student).state_dict()) - classifier
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{student} from {teacher}: {selected} selected, {classifier} classifier; nothing written"


# ---------------------------------------------------------------------------------------------------------
# Weights of the hub


def hub_file(cache, repository):
    """Where huggingface_hub would have kept the weights of a timm repository."""
    directory = cache / f"models--timm--{repository}"
    for name in ("refs", "snapshots/abc"):
        (directory / name).mkdir(parents=True)
    (directory / "refs" / "main").write_text("abc")
    return directory / "snapshots" / "abc" / "model.safetensors"


@pytest.mark.parametrize(
    ("teacher", "student", "layout"),
    [(*pair, "timm") for pair in PAIRS if pair[1] != "vit_small"] + [(CLIP, "vit_tiny_clip", "open_clip")],
)
def test_weights_of_the_hub(teacher, student, layout, cli, tmp_path, monkeypatch):
    # timm's own loading, offline; its repository of CLIP has been in both layouts.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    weights = weights_of(teacher)
    file = hub_file(tmp_path / "hub", meta(teacher).pretrained_cfg["hf_hub_id"].removeprefix("timm/"))
    safetensors.torch.save_file(openai_names(weights) if layout == "open_clip" else weights, file)
    assert cli(select_main, *command(teacher, student, tmp_path / "x.pth")) is None
    assert_initialises(tmp_path / "x.pth", student, halved(weights, student))
    record = json.loads((tmp_path / "x.json").read_text())["teacher"]
    assert record.pop("source").startswith("timm/")
    assert record.pop("sha256") == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record.keys() == {"name", "model", "kwargs"}


# ---------------------------------------------------------------------------------------------------------
# Files of the publishers


def run_state():
    """What training scripts keep beside a model."""
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2), "step": 3}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {"optimizer": optimizer, "epoch": 3, "args": argparse.Namespace(lr=1e-4, output_dir="x", blr=None)}


def random_tensors(shapes):
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def mae_pretraining(weights):
    """MAE's model while it is pretrained: encoder and decoder."""
    shapes = {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 5, 16), "decoder_norm.weight": (16,)}
    shapes |= {"decoder_norm.bias": (16,), "decoder_embed.weight": (16, 64), "decoder_embed.bias": (16,)}
    shapes |= {"decoder_pred.weight": (768, 16), "decoder_pred.bias": (768,)}
    for layer in range(2):
        for name, shape in {"norm1": (16,), "attn.qkv": (48, 16), "attn.proj": (16, 16), "mlp.fc1": (64, 16)}.items():
            shapes[f"decoder_blocks.{layer}.{name}.weight"] = shape
            shapes[f"decoder_blocks.{layer}.{name}.bias"] = shape[:1]
    return weights | random_tensors(shapes)


def dino_head():
    shapes = {"last_layer.weight_g": (10, 1), "last_layer.weight_v": (10, 8)}
    for layer in (0, 2, 4):
        shapes |= {f"mlp.{layer}.weight": (8, 8), f"mlp.{layer}.bias": (8,)}
    return random_tensors(shapes)


def dino_pretraining(weights):
    """A checkpoint of DINO: student and teacher, each with a projection head."""
    other = random_tensors({key: value.shape for key, value in weights.items()})
    student = prefixed("module.backbone.", other) | prefixed("module.head.", dino_head())
    teacher = prefixed("backbone.", weights) | prefixed("head.", dino_head())
    return {"student": student, "teacher": teacher, "dino_loss": {"center": torch.zeros(1, 10)}, **run_state()}


def openai_names(weights):
    """CLIP's keys as OpenAI and open_clip name them, its text model among them."""
    out = {}
    for key, value in weights.items():
        if key == "head.bias":  # the projection has none; timm's model has, of zeros
            continue
        for theirs, ours in {
            "class_embedding": "cls_token",
            "positional_embedding": "pos_embed",
            "conv1": "patch_embed.proj",
            "ln_pre": "norm_pre",
            "transformer.resblocks.": "blocks.",
            "ln_1": "norm1",
            "ln_2": "norm2",
            "attn.in_proj_": "attn.qkv.",
            "attn.out_proj": "attn.proj",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }.items():
            key = key.replace(ours, theirs)
        key = re.sub(r"^norm\.", "ln_post.", key).replace("head.weight", "proj")
        if key == "proj":
            value = value.T.contiguous()
        out[f"visual.{key}"] = value.flatten() if key == "class_embedding" else value
    out["visual.positional_embedding"] = out["visual.positional_embedding"][0]
    shapes = {"positional_embedding": (7, 16), "text_projection": (16, 512), "logit_scale": ()}
    shapes |= {"token_embedding.weight": (30, 16), "ln_final.weight": (16,), "ln_final.bias": (16,)}
    shapes |= {"transformer.resblocks.0.attn.in_proj_weight": (48, 16), "transformer.resblocks.0.ln_1.weight": (16,)}
    return out | random_tensors(shapes)


def openai_precision(weights):
    """Half precision as in OpenAI's file: all but embeddings and normalisations."""
    whole = r"(^|\.)(ln_\w+\.\w+|class_embedding|positional_embedding|token_embedding\.weight|logit_scale)$"
    return {key: value if re.search(whole, key) else value.half() for key, value in weights.items()}


def save_npz(arrays, path):
    np.savez(path, **arrays)


@dataclass(frozen=True)
class Published:
    """A file as its publisher distributes it: how to make it of timm's tensors, and what else it has."""

    teacher: str
    file: str
    convert: Callable
    save: Callable = torch.save
    student: str = "vit_tiny"
    unused: dict = field(default_factory=dict)


def backbone(weights):
    return {key: value for key, value in weights.items() if not key.startswith("head.")}


TEXT = {"positional_embedding": 1, "text_projection": 1, "logit_scale": 1, "token_embedding": 1}
TEXT |= {"ln_final": 2, "transformer": 2}
DECODER = {"mask_token": 1, "decoder_pos_embed": 1, "decoder_norm": 2, "decoder_embed": 2, "decoder_pred": 2}
DECODER |= {"decoder_blocks": 16}
PUBLISHED = {
    **{
        name: Published(name, "x.npz", lambda w: jax_names(w, heads=4), save_npz, student)
        for name, student in (pair for pair in PAIRS if "augreg" in pair[0] and pair[1] != "vit_small")
    },
    "ConvNeXt-T": Published(CONVNEXT, "x.pth", lambda w: {"model": release_names(w)}, student="convnext_femto"),
    "DeiT-S": Published(DEIT, "x.pth", lambda w: {"model": w}),
    "MAE": Published(MAE, "x.pth", lambda w: {"model": w}),
    "MAE with its decoder": Published(MAE, "x.pth", lambda w: {"model": mae_pretraining(w)}, unused=DECODER),
    "MAE, a checkpoint": Published(
        MAE, "x.pth", lambda w: {"model": mae_pretraining(w), **run_state()}, unused=DECODER
    ),
    "DINO": Published(DINO, "x.pth", lambda w: w),
    "DINO, a checkpoint": Published(DINO, "x.pth", dino_pretraining, unused={"head": 8}),
    "CLIP of OpenAI": Published(
        CLIP,
        "x.pt",
        lambda w: openai_precision(openai_names(w)),
        save_torchscript,
        "vit_tiny_clip",
        TEXT | {"input_resolution": 1, "context_length": 1, "vocab_size": 1},
    ),
    "CLIP of open_clip": Published(CLIP, "x.bin", openai_names, student="vit_tiny_clip", unused=TEXT),
    "CLIP of open_clip, safe": Published(
        CLIP, "x.safetensors", openai_names, safetensors.torch.save_file, "vit_tiny_clip", TEXT
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_give_the_values_of_timms_keys_and_say_what_they_leave_out(name, cli, tmp_path, capsys):
    published = PUBLISHED[name]
    teacher, student, file = published.teacher, published.student, tmp_path / published.file
    weights = weights_of(teacher)
    published.save(published.convert(weights), file)
    assert cli(select_main, *command(teacher, student, tmp_path / "out.pth", "--pretrained_path", file)) is None
    expected = halved(weights, student)
    if name == "CLIP of OpenAI":
        whole = r"norm|cls_token|pos_embed"
        expected = {key: value if re.search(whole, key) else value.half() for key, value in expected.items()}
    assert_initialises(tmp_path / "out.pth", student, expected)

    record = json.loads((tmp_path / "out.json").read_text())["teacher"]
    assert record.get("unused", {}) == published.unused
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == bool(published.unused)
    assert all(f"{key} ({count})" in lines[0] for key, count in published.unused.items())


def test_both_activations_of_clip_get_the_same_weights(cli, tmp_path):
    weights = weights_of(CLIP)
    torch.save(weights, tmp_path / "x.pth")
    quick = {"act_layer": "quick_gelu"}
    named = command(CLIP, "vit_tiny_clip", tmp_path / "y.pth", "--pretrained_path", tmp_path / "x.pth", small=quick)
    assert cli(select_main, *named) is None
    assert_initialises(tmp_path / "y.pth", "vit_tiny_clip", halved(weights, "vit_tiny_clip"), **quick)


# ---------------------------------------------------------------------------------------------------------
# Classifiers and normalisations that differ


def test_classifier_of_deit_is_selected_on_request(cli, tmp_path):
    weights = weights_of(DEIT)
    torch.save({"model": weights}, tmp_path / "x.pth")
    more = ["--include_head", "--pretrained_path", tmp_path / "x.pth"]
    assert cli(select_main, *command(DEIT, "vit_tiny", tmp_path / "y.pth", *more)) is None
    head = {"head.weight": weights["head.weight"][:, ::2], "head.bias": weights["head.bias"]}
    assert_same(read(tmp_path / "y.pth"), halved(weights, "vit_tiny") | head)


def test_projection_of_clip_is_a_classifier_of_512_classes_without_bias(cli, tmp_path):
    weights = weights_of(CLIP)
    torch.save(openai_names(weights), tmp_path / "x.pth")
    more = ["--include_head", "--pretrained_path", tmp_path / "x.pth"]
    message = cli(select_main, *command(CLIP, "vit_tiny_clip", tmp_path / "y.pth", *more))
    assert "--include_head: teacher has 512 classes, student 1000" in message
    more += ["--student_kwargs", *words(SMALL["vit"]), "num_classes=512"]
    assert cli(select_main, *command(CLIP, "vit_tiny_clip", tmp_path / "y.pth", *more)) is None
    content = read(tmp_path / "y.pth")
    assert torch.equal(content["head.weight"], weights["head.weight"][:, ::2])
    assert not content["head.bias"].any()


@pytest.mark.parametrize("teacher", [MAE, DINO])
def test_teachers_without_a_classifier_have_none_to_include(teacher, cli, tmp_path):
    message = cli(select_main, *command(teacher, "vit_tiny", tmp_path / "y.pth", "--include_head"))
    assert message == "--include_head: the teacher has no classifier; leave it out"


@pytest.mark.parametrize("teacher", [MAE, DINO])
def test_classifier_that_the_teacher_does_not_have_is_left_out_visibly(teacher, cli, tmp_path):
    weights = weights_of(teacher)
    torch.save(weights | random_tensors({"head.weight": (10, 64), "head.bias": (10,)}), tmp_path / "x.pth")
    more = ["--pretrained_path", tmp_path / "x.pth"]
    assert cli(select_main, *command(teacher, "vit_tiny", tmp_path / "y.pth", *more)) is None
    assert_initialises(tmp_path / "y.pth", "vit_tiny", halved(weights, "vit_tiny"))
    assert json.loads((tmp_path / "y.json").read_text())["teacher"]["unused"] == {"head": 2}


def test_mae_after_fine_tuning_normalises_after_pooling_and_so_must_its_student(cli, tmp_path):
    average = {"global_pool": "avg"}
    weights = weights_of(MAE, num_classes=1000, **average)
    assert "fc_norm.weight" in weights
    torch.save({"model": weights}, tmp_path / "x.pth")
    more = ["--pretrained_path", tmp_path / "x.pth"]
    message = cli(select_main, *command(MAE, "vit_tiny", tmp_path / "y.pth", *more))
    assert "norm.weight is missing" in message
    assert "set its kwargs" in message
    message = cli(select_main, *command(MAE, "vit_tiny", tmp_path / "y.pth", *more, large=average))
    assert "fc_norm.weight: the student has no such tensor" in message
    tuned = command(MAE, "vit_tiny", tmp_path / "y.pth", *more, large=average, small=average)
    assert cli(select_main, *tuned) is None
    assert_initialises(tmp_path / "y.pth", "vit_tiny", halved(weights, "vit_tiny", **average), **average)


# ---------------------------------------------------------------------------------------------------------
# Nothing is lost without a word


def refusal(cli, teacher, student, file, output):
    """What the command says about a file; it has written nothing."""
    message = cli(select_main, *command(teacher, student, output, "--pretrained_path", file))
    assert message is not None
    assert f"--pretrained_path {file}: " in message
    assert written(output) == []
    return message


def test_tensors_that_timms_conversion_would_drop_are_an_error(cli, tmp_path):
    weights = prefixed("visual.trunk.", backbone(weights_of(DEIT)))
    torch.save(weights | random_tensors({"visual.head.mlp.weight": (3, 3), "text.weight": (3,)}), tmp_path / "x.pth")
    message = refusal(cli, DEIT, "vit_tiny", tmp_path / "x.pth", tmp_path / "out")
    assert "loses 1 of its tensors" in message


def test_jax_files_of_deeper_models_are_refused(cli, tmp_path):
    save_npz(jax_names(weights_of(IN21K, depth=4), heads=4), tmp_path / "x.npz")
    message = refusal(cli, IN21K, "vit_tiny", tmp_path / "x.npz", tmp_path / "out")
    assert "4 layers, the model 3" in message


def test_layer_before_the_classifier_of_older_jax_files_is_left_out_visibly(cli, tmp_path):
    weights = weights_of(IN21K)
    layer = {"pre_logits/kernel": np.zeros((64, 64)), "pre_logits/bias": np.zeros(64)}
    save_npz(jax_names(weights, heads=4) | layer, tmp_path / "x.npz")
    more = ["--pretrained_path", tmp_path / "x.npz"]
    assert cli(select_main, *command(IN21K, "vit_tiny", tmp_path / "y.pth", *more)) is None
    assert_initialises(tmp_path / "y.pth", "vit_tiny", halved(weights, "vit_tiny"))
    assert json.loads((tmp_path / "y.json").read_text())["teacher"]["unused"] == {"pre_logits": 2}


def test_whole_of_clip_is_no_teacher_for_a_model_that_does_not_normalise_first(cli, tmp_path):
    torch.save(openai_names(weights_of(CLIP)), tmp_path / "x.pth")
    assert "patch_embed.proj.bias is missing" in refusal(cli, DEIT, "vit_tiny", tmp_path / "x.pth", tmp_path / "out")


class Calls:
    """Unpickling it calls a function."""

    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(Calls()), pickle.dumps([1])])
def test_torchscript_archives_with_anything_else_in_them_are_refused(content, cli, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", content)
    refusal(cli, CLIP, "vit_tiny_clip", tmp_path / "x.pt", tmp_path / "out")
    assert "code was run" not in capsys.readouterr().out


def test_truncated_torchscript_archives_are_refused(cli, tmp_path):
    save_torchscript(openai_names(weights_of(CLIP)), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content[: len(content) // 2])
    refusal(cli, CLIP, "vit_tiny_clip", tmp_path / "x.pt", tmp_path / "out")
