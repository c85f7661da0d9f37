"""Projection: the equations, what they give back exactly, and families."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
from timm.layers import StdConv2d

from architectures import MODELS, lively, models, reads
from helpers import images_for, meta, random
from weight_selection import select_weights
from weight_selection.errors import InputError
from weight_selection.plan import anatomy, make_plan
from weight_selection.projection import equations
from weight_selection.projection.activation_stats import ActivationStats
from weight_selection.projection.symmetries import HEADS, ROTATED, UNIFORM, Symmetries
from weight_selection.projection.symmetry_check import check_streams
from weight_selection.sources.timm_models import create_model

DOUBLE = torch.float64

# ---------------------------------------------------------------------------------------------------------
# Equations


def test_moments_of_batches_are_those_of_a_plain_loop():
    x, z = random(50, 4) + 1, random(50, 3, seed=1) - 2
    moments, variances = equations.Moments(), equations.Variances()
    for part, other in zip(x.split(7), z.split(7), strict=True):
        moments.add(part, other)
        variances.add(part)
    loop = (
        sum(
            torch.outer(torch.cat([a, a.new_ones(1)]), torch.cat([b, b.new_ones(1)])) for a, b in zip(x, z, strict=True)
        )
        / 50
    )
    torch.testing.assert_close(moments.mean, loop)
    torch.testing.assert_close(moments.covariance, (x - x.mean(0)).T @ (z - z.mean(0)) / 50)
    torch.testing.assert_close(variances.variance, x.var(0, correction=0))


@pytest.mark.parametrize("batch", [1, 5])
def test_a_survey_has_the_moments_of_what_every_layer_takes(batch):
    model = lively(create_model("test_vit", num_classes=7))
    images = images_for(model, 5)
    traced = TracedModel.of(model, anatomy(model, "teacher"))
    with torch.no_grad():
        stats = ActivationStats(traced, images.split(batch))
        taken = {}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, key=f"{name}.weight": taken.__setitem__(key, args[0]))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        model(images)
    for hook in hooks:
        hook.remove()
    assert taken.keys() <= stats.moments.keys()
    for key, x in taken.items():
        x = x.reshape(-1, x.shape[-1])
        torch.testing.assert_close(stats.moments[key].variance, x.var(0, correction=0))
        if isinstance(stats.moments[key], equations.Moments):
            torch.testing.assert_close(stats.moments[key].mean[:-1, :-1], x.T @ x / len(x))
    assert stats.norm_of["blocks.1.mlp.fc1.weight"] == "blocks.1.norm2.weight"


def test_a_rotation_has_orthonormal_rows_that_are_orthogonal_to_ones_but_for_their_mean():
    n = random(200, 12)
    n = n - n.mean(1, keepdim=True)
    frame = torch.arange(0, 12, 2)
    write = equations.rotation(n.T @ n, frame)
    torch.testing.assert_close(write @ write.T, torch.eye(6, dtype=DOUBLE) - 1 / 6)  # a projection off ones
    torch.testing.assert_close(write.sum(0), torch.zeros(12, dtype=DOUBLE))
    energies = torch.linalg.eigvalsh(n.T @ n)
    torch.testing.assert_close(((write @ n.T) ** 2).sum(), energies[-5:].sum())  # the leading ones


def test_a_rotation_is_the_nearest_to_its_coordinates():
    n = random(200, 12)
    n = n - n.mean(1, keepdim=True)
    frame = torch.tensor([1, 2, 5, 6, 8, 11])
    write = equations.rotation(n.T @ n, frame)
    select = torch.eye(12, dtype=DOUBLE)[frame]
    best = (write - select).norm()
    for seed in range(20):
        turn = random(6, 6, seed=seed)
        turn[:, 0] = 1
        turn = torch.linalg.qr(turn).Q[:, 1:]
        other = random(6, 6, seed=seed + 100)
        other[:, 0] = 1
        turned = turn @ torch.linalg.qr(other).Q[:, 1:].T @ write
        assert (turned - select).norm() > best


def test_a_rotation_of_a_stream_that_uses_few_directions_keeps_off_ones_too():
    n = random(200, 3) @ random(3, 12)
    n = n - n.mean(1, keepdim=True)
    write = equations.rotation(n.T @ n, torch.arange(8))
    torch.testing.assert_close(write @ write.T, torch.eye(8, dtype=DOUBLE) - 1 / 8)
    torch.testing.assert_close(write.sum(0), torch.zeros(12, dtype=DOUBLE))
    torch.testing.assert_close(((write @ n.T) ** 2).sum(), (n**2).sum())


def test_greedy_coordinates_explain_their_copies_and_what_is_read():
    base = random(100, 4) * torch.tensor([1.0, 2, 3, 4], dtype=DOUBLE)
    x = base[:, [0, 0, 1, 1, 2, 2, 3, 3]]
    covariance = torch.cov(x.T)
    kept = equations.greedy(covariance, torch.eye(8, dtype=DOUBLE), 4)
    assert (kept // 2).tolist() == [0, 1, 2, 3]  # one of each pair
    reader = torch.zeros(8, dtype=DOUBLE)
    reader[1] = 1
    assert equations.greedy(covariance, torch.diag(reader), 1).item() in (0, 1)  # the only pair that is read


def test_each_greedy_choice_is_the_best_one():
    x = random(60, 7)
    covariance, read = torch.cov(x.T), random(3, 7, seed=2)
    weight = read.T @ read

    def lost(kept):
        inside = covariance[kept][:, kept]
        rest = covariance - covariance[:, kept] @ torch.linalg.inv(inside) @ covariance[kept]
        return (weight * rest).sum()

    kept = []
    for _ in range(3):
        kept.append(min(set(range(7)) - set(kept), key=lambda index: lost([*kept, index])))
    assert equations.greedy(covariance, weight, 3).tolist() == sorted(kept)


def test_shared_products_are_the_best_of_their_rank():
    q, k = random(300, 6) @ random(6, 6, seed=3), random(300, 6, seed=1) @ random(6, 6, seed=4)
    queries, keys = q.T @ q / 300, k.T @ k / 300

    def error(to_q, to_k):
        middle = torch.eye(6, dtype=DOUBLE) - to_q.T @ to_k * (6 / len(to_q)) ** 0.5
        return (queries @ middle @ keys @ middle.T).trace()

    best = error(*equations.shared_products(queries, keys, 2))
    for seed in range(20):
        some = torch.linalg.qr(random(6, 2, seed=seed)).Q.T * (2 / 6) ** 0.25
        assert error(some, some) > best
    exact = equations.shared_products(queries, keys, 6)
    assert error(*exact) < 1e-12 and torch.equal(exact[0], torch.eye(6, dtype=DOUBLE))


def test_a_read_is_least_squares_and_stays_at_its_prior_where_nothing_is_seen(monkeypatch):
    monkeypatch.setattr(equations, "RIDGE", 1e-12)
    z = random(100, 4)
    z[:, 3] = 0  # never seen
    x = z @ random(4, 6, seed=1) + 3
    moments, own = equations.Moments(), equations.Moments()
    moments.add(x, z)
    own.add(z, z)
    prior = random(6, 5, seed=2)
    read = equations.solve_up_map(moments.mean[:-1], own.mean, prior)
    torch.testing.assert_close(z @ read[:, :-1].T + read[:, -1], x)
    torch.testing.assert_close(read[:, 3], prior[:, 3])


# ---------------------------------------------------------------------------------------------------------
# What comes back exactly

STREAMS = (
    "vit",
    "vit_qk_norm",
    "deit3",
    "dinov2_reg",
    "dinov2_swiglu",
    "siglip",
    "eva",
    "beit",
    "cait",
    "efficientvit",
)
SMALL_IMAGES = {name: 32 for name in MODELS if "img_size" not in MODELS[name][1]}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["project", "greedy"])
def test_a_student_as_large_as_its_teacher_has_its_function(name, method):
    teacher, _ = models(name)
    lively(teacher)
    if method == "project" and not _streams(teacher):
        with pytest.raises(InputError, match="choose greedy"):
            check_streams(Symmetries(teacher, anatomy(teacher, name).neurons), name)
        return
    images = images_for(teacher, 3, SMALL_IMAGES.get(name))
    student = lively(copy.deepcopy(teacher))
    for parameter in student.parameters():
        parameter.data += 1
    try:
        first = select_weights(teacher, student, element_selection=method, calibration=images, include_head=True)
    except InputError as error:
        assert method == "project" and "computes something else when its residual stream is rotated" in str(error)
        assert name not in STREAMS
        return
    assert method == "greedy" or name in (*STREAMS, "swin", "swin_v2")
    student.load_state_dict(first, strict=False)
    with torch.no_grad():
        expected = teacher(images)
        assert expected.std() > 1e-3
        torch.testing.assert_close(student(images), expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


def _streams(model):
    symmetries = Symmetries(model, anatomy(model, "teacher").neurons)
    return [space for space in symmetries.uses if symmetries.treatment(space, True) == ROTATED]


def disguised(plan, teacher, student):
    """A teacher's state_dict that computes what the student does with more neurons of each kind.

    Beside every neuron of the student's are copies that nobody reads, so a normalisation sees the same statistics;
    whole heads are copied, for whom none writes. Layers that the plan drops are zero.
    """
    whole = anatomy(teacher, "teacher")
    symmetries = Symmetries(teacher, whole.neurons)
    state = {key: torch.zeros_like(value) for key, value in teacher.state_dict().items()}
    weights = student.state_dict()
    for entry in plan:
        value = weights[entry.key]
        for dim, size in enumerate(entry.source_shape):
            origin, alive = np.arange(size), np.ones(size, bool)
            spaces = [part.space for part in whole.neurons.parts[entry.source][dim] or ()]
            for (theirs, ours), space in zip((entry.parts or {}).get(dim, ()), spaces, strict=False):
                times = [t // s for t, s in zip(theirs.shape, ours.shape, strict=True)]
                axes = [np.arange(t) for t in theirs.shape]
                if symmetries.treatment(space, False) == HEADS:
                    places = [axis % s for axis, s in zip(axes, ours.shape, strict=True)]
                    first = [axis < s for axis, s in zip(axes, ours.shape, strict=True)]
                else:
                    places = [axis // n for axis, n in zip(axes, times, strict=True)]
                    first = [axis % n == 0 for axis, n in zip(axes, times, strict=True)]
                origin[theirs] = ours[np.ix_(*places)]
                alive[theirs] = np.all(np.meshgrid(*first, indexing="ij"), axis=0)
            value = value.index_select(dim, torch.from_numpy(origin))
            if dim == reads(teacher, entry.source):
                value = value * torch.from_numpy(alive).view([-1 if d == dim else 1 for d in range(value.ndim)])
        state[entry.source] = value
    return state


RECOVERED = {
    "greedy": ("vit", "vit_qk_norm", "deit3", "dinov2_reg", "dinov2_swiglu", "dinov3", "eva", "convnext", "convnext_v2")
    + ("mixer", "gmixer", "resnet", "wide_resnet", "resnext", "metaformer", "convmixer"),
    "project": ("vit", "vit_qk_norm", "deit3", "dinov2_reg", "dinov2_swiglu", "eva"),
}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in RECOVERED for name in RECOVERED[method]])
def test_a_teacher_that_uses_only_a_part_of_its_neurons_is_recovered(method, name, monkeypatch):
    monkeypatch.setattr(equations, "RIDGE", 1e-11)
    teacher, student = models(name)
    for model in (teacher, lively(student)):
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-12  # a part of the variance of another size
    plan = make_plan(teacher, student, include_head=True)
    teacher.double().eval().load_state_dict(disguised(plan, teacher, student))
    images = images_for(student, 24, SMALL_IMAGES.get(name))
    with torch.no_grad():
        expected = student(images)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-9, atol=1e-9)
        found = copy.deepcopy(student)
        first = select_weights(teacher, student, element_selection=method, calibration=images, include_head=True)
        for parameter in found.parameters():
            parameter.data += 1
        found.load_state_dict(first, strict=False)
        error = (found(images) - expected).norm() / expected.norm()
    assert error < 1e-6, error


def orthogonal_to_ones(size, count, seed):
    columns = random(size, count + 1, seed=seed)
    columns[:, 0] = 1
    return torch.linalg.qr(columns).Q[:, 1:]


def oblique(student, teacher):
    """A teacher's state_dict that computes what the student does, with its stream along no coordinates of its own.

    x = V s, so that n = sqrt(D/d) V LN(s); heads have dimensions more that are zero.
    """
    d, large = student.embed_dim, teacher.embed_dim
    turn = orthogonal_to_ones(large, d - 1, 5) @ orthogonal_to_ones(d, d - 1, 6).T
    into = turn.T * (d / large) ** 0.5
    heads, a, b = 2, large // 2, d // 2
    inside = torch.cat([torch.arange(b) + head * a for head in range(heads)])
    state = {key: torch.zeros_like(value) for key, value in teacher.state_dict().items()}
    given = student.state_dict()
    norms = {"attn.qkv": "norm1", "mlp.fc1": "norm2", "head": "norm"}
    for key, value in given.items():
        layer, _, kind = key.rpartition(".")
        norm = next((layer.removesuffix(end) + norms[end] for end in norms if layer.endswith(end)), None)
        if "norm" in layer:
            value = torch.ones(large) if kind == "weight" else torch.zeros(large)
        elif norm is not None:
            gain, shift = given[f"{norm}.weight"], given[f"{norm}.bias"]
            weight = given[f"{layer}.weight"]
            value = weight * gain @ into if kind == "weight" else value + weight @ shift
        elif layer.endswith(("attn.proj", "mlp.fc2", "patch_embed.proj")):
            value = torch.tensordot(turn, value, 1)
        else:
            value = value @ turn.T
        if layer.endswith("attn.qkv"):
            wide = torch.zeros(3, large, *value.shape[1:], dtype=DOUBLE)
            wide[:, inside] = value.view(3, d, *value.shape[1:])
            wide[0] *= (a / b) ** 0.5
            value = wide.flatten(0, 1)
        if layer.endswith("attn.proj") and kind == "weight":
            wide = torch.zeros(large, large, dtype=DOUBLE)
            wide[:, inside] = value
            value = wide
        state[key] = value
    return state


def test_a_stream_along_no_coordinates_is_recovered_by_a_rotation_only(monkeypatch):
    monkeypatch.setattr(equations, "RIDGE", 1e-11)
    options = {"img_size": 32, "patch_size": 8, "num_classes": 7, "num_heads": 2, "depth": 2}
    student = lively(create_model("vit_tiny", **options, embed_dim=32))
    teacher = lively(create_model("vit_tiny", **options, embed_dim=64, mlp_ratio=2))
    for module in (*teacher.modules(), *student.modules()):
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    teacher.load_state_dict(oblique(student, teacher))
    images = images_for(student, 24)
    errors = {}
    with torch.no_grad():
        expected = student(images)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-8, atol=1e-8)
        for method in ("project", "greedy"):
            first = select_weights(teacher, student, element_selection=method, calibration=images, include_head=True)
            found = lively(copy.deepcopy(student))
            found.load_state_dict(first, strict=False)
            errors[method] = ((found(images) - expected).norm() / expected.norm()).item()
    assert errors["project"] < 1e-6 and errors["greedy"] > 1e-2, errors


def test_heads_of_a_low_rank_are_recovered_in_smaller_and_in_more_heads(monkeypatch):
    monkeypatch.setattr(equations, "RIDGE", 1e-11)
    options = {"img_size": 32, "patch_size": 8, "num_classes": 7, "depth": 2, "embed_dim": 32}
    teacher = lively(create_model("vit_tiny", **options, num_heads=2))
    for block in teacher.blocks:  # queries and keys that share 8 of 16 dimensions
        rows = block.attn.qkv.weight.data.view(3, 2, 16, 32)
        rows[0, :, 8:] = random(2, 8, 8) @ rows[0, :, :8]
        bias = block.attn.qkv.bias.data.view(3, 2, 16)
        bias[0, :, 8:] = (random(2, 8, 8) @ bias[0, :, :8, None])[..., 0]
    student = lively(create_model("vit_tiny", **options, num_heads=4))  # the values of each go into two heads
    images = images_for(student, 24)
    student.load_state_dict(
        select_weights(teacher, student, element_selection="greedy", calibration=images, include_head=True)
    )
    with torch.no_grad():
        torch.testing.assert_close(student(images), teacher(images), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# Families


def test_roles_follow_from_what_touches_the_neurons():
    model = meta("vit_tiny")
    symmetries = Symmetries(model, anatomy(model, "teacher").neurons)
    assert [attention.heads for attention in symmetries.attentions.values()] == [3] * 12
    parts = symmetries.neurons.parts
    assert symmetries.treatment(parts["cls_token"][2][0].space, True) == ROTATED
    assert symmetries.treatment(parts["blocks.0.mlp.fc2.weight"][1][0].space, True) == "strongest"
    rotary = meta("vit_small_patch16_dinov3")
    symmetries = Symmetries(rotary, anatomy(rotary, "teacher").neurons)
    assert not symmetries.attentions
    assert symmetries.treatment(symmetries.neurons.parts["blocks.0.attn.qkv.weight"][0][0].space, True) == UNIFORM


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_tiny", "conv_dw.weight works on single coordinates"),
        ("resnet18", "no layer normalisation reads it"),
        ("vit_small_patch16_dinov3", "blocks.0.attn.qkv.weight has no bias to take over"),
    ],
)
def test_a_stream_that_is_tied_to_its_coordinates_is_not_rotated(name, reason):
    model = meta(name)
    with pytest.raises(InputError, match=reason):
        check_streams(Symmetries(model, anatomy(model, name).neurons), name)


def test_a_rotation_that_structure_allows_but_the_function_does_not_is_refused():
    teacher, student = (lively(model) for model in models("mixer"))  # its hidden units are of tokens and channels
    with pytest.raises(InputError, match="computes something else when its residual stream is rotated; choose greedy"):
        select_weights(teacher, student, element_selection="project", calibration=images_for(teacher))


def test_heads_that_are_not_free_are_selected_uniformly_which_is_said(capsys):
    teacher, student = (lively(model) for model in models("cait"))
    select_weights(teacher, student, element_selection="greedy", calibration=images_for(teacher))
    said = capsys.readouterr()
    assert (said.out + said.err).count("ClassAttn: queries, keys and values are not free inside a head") == 1
    assert "TalkingHeadAttn" not in said.out + said.err


ODD = {  # what the models above do not have: (arguments of both, of the teacher, of the student)
    "resnetv2_50": (
        {"layers": (1, 1, 1, 1), "conv_layer": StdConv2d},
        {"channels": (64,) * 4},
        {"channels": (32,) * 4},
    ),
    "test_nfnet": ({}, {}, {}),  # products of parameters and numbers
    "swinv2_cr_tiny_224": (
        {"img_size": 64, "depths": (1, 1), "window_size": 4},
        {"embed_dim": 32, "num_heads": (2, 4)},
        {"embed_dim": 16, "num_heads": (1, 2)},
    ),
    "coat_lite_tiny": (
        {"img_size": 32, "serial_depths": (1, 1, 1, 1)},
        {"embed_dims": (32, 32, 64, 64)},
        {"embed_dims": (16, 16, 32, 32)},
    ),
    "vit_srelpos_small_patch16_224": (
        {"img_size": 32, "patch_size": 8, "depth": 2},
        {"embed_dim": 64, "num_heads": 8},
        {"embed_dim": 32, "num_heads": 4},
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_weights_that_are_computed_shared_modules_and_tables_of_all_blocks_stay_consistent(name):
    both, large, small = ODD[name]
    teacher, student = (lively(create_model(name, num_classes=7, **both, **sizes)) for sizes in (large, small))
    images = images_for(teacher, 4, None if "img_size" in both else 32)
    for parameter in student.parameters():
        parameter.data.fill_(torch.nan)
    first = select_weights(teacher, student, element_selection="greedy", calibration=images, include_head=True)
    student.load_state_dict(first)
    with torch.no_grad():
        assert student(images).isfinite().all()
        if large == small:
            torch.testing.assert_close(student(images), teacher(images))
    if "srelpos" in name:  # the table of all blocks has one element per head, and blocks keep the same heads
        large, small = (model.shared_rel_pos.mlp.fc2.weight for model in (teacher, student))
        assert [(row == large[:, 0]).nonzero().item() for row in small[:, 0]] == [0, 2, 4, 6]
        symmetries = Symmetries(teacher, anatomy(teacher, "teacher").neurons)
        assert not symmetries.attentions, "these heads are chosen apart from their table"
    with pytest.raises(InputError, match="choose greedy"):
        select_weights(teacher, student, element_selection="project", calibration=images)


def closeness(teacher, student, images, **options):
    """Correlation of what a student's first weights and the teacher compute."""
    first = select_weights(teacher, student, include_head=True, **options)
    student = copy.deepcopy(student)
    student.load_state_dict(first, strict=False)
    with torch.no_grad():
        both = torch.stack([model.eval()(images).flatten() for model in (teacher, student)])
    return torch.corrcoef(both)[0, 1].item()


PRE_NORM = {"img_size": 32, "patch_size": 8, "num_classes": 7, "depth": 2, "pre_norm": True, "mlp_ratio": 2}
PAIRS = {
    "norm in the stream": ("vit_tiny", PRE_NORM, {"embed_dim": 64, "num_heads": 4}, {"embed_dim": 32, "num_heads": 2}),
    "a ratio that is no integer": (
        "vit_tiny",
        PRE_NORM | {"pre_norm": False},
        {"embed_dim": 60, "num_heads": 4},
        {"embed_dim": 36, "num_heads": 3},
    ),
    "fewer layers": (
        "vit_tiny",
        PRE_NORM | {"pre_norm": False, "embed_dim": 48, "num_heads": 4},
        {"depth": 5},
        {"depth": 3},
    ),
    "half the width, fewer layers": (
        "vit_tiny",
        PRE_NORM | {"pre_norm": False, "init_values": 0.5},
        {"depth": 5, "embed_dim": 64, "num_heads": 4},
        {"depth": 3, "embed_dim": 32, "num_heads": 2},
    ),
    "other images": (
        "vit_tiny",
        {"patch_size": 8, "num_classes": 7, "depth": 2, "mlp_ratio": 2},
        {"embed_dim": 64, "num_heads": 4, "img_size": 64},
        {"embed_dim": 32, "num_heads": 2, "img_size": 32},
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_projected_weights_are_nearer_to_the_teacher_than_selected_ones(kind):
    architecture, both, large, small = PAIRS[kind]
    torch.manual_seed(0)
    teacher = create_model(architecture, **{**both, **large}).eval()
    student = create_model(architecture, **{**both, **small}).eval()
    for parameter in teacher.parameters():  # weights that matter, few directions of them more than others
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
            parameter.data *= torch.linspace(2, 0, parameter.shape[1]) ** 2
    images = images_for(student, 32).float()
    seen = copy.deepcopy(teacher)
    if kind == "other images":
        seen.set_input_size(img_size=32)
    rules = {method: {"element_selection": method, "calibration": images} for method in ("project", "greedy")}
    if kind == "fewer layers":
        rules = {"greedy": rules["greedy"]}
    layers = {"layer_selection": "uniform"}  # 0, 2, 4 of five
    plain = closeness(seen, student, images, **layers)
    for method, options in rules.items():
        options |= layers
        near = closeness(seen, student, images, **options)
        assert near > plain + 0.03, method
        given = select_weights(teacher, student, **options, include_head=True)
        again = select_weights(seen, student, **options, include_head=True)
        assert all(torch.equal(given[key], again[key]) for key in given), "the teacher was not brought to the images"


def test_of_the_models_nothing_changes():
    teacher, student = (lively(model) for model in models("vit"))
    before = [{key: value.clone() for key, value in model.state_dict().items()} for model in (teacher, student)]
    teacher.train()
    select_weights(teacher, student, element_selection="project", calibration=images_for(teacher))
    assert teacher.training
    for model, weights in zip((teacher, student), before, strict=True):
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_classifier_that_is_not_there_reads_nothing_and_cannot_be_selected():
    teacher, student = models("vit")
    images = images_for(teacher).float()
    backbone = {key: value for key, value in teacher.state_dict().items() if not key.startswith("head.")}
    options = {"element_selection": "project", "calibration": images, "weights": backbone}
    first = select_weights(teacher, student, **options)
    teacher.head.weight.data += 1
    again = select_weights(teacher, student, **options)
    assert all(torch.equal(first[key], again[key]) for key in first)
    with pytest.raises(InputError, match="head.weight is absent"):
        select_weights(teacher, student, include_head=True, **options)


@pytest.mark.parametrize("classes", [0, 7])
def test_features_before_a_new_classifier_keep_their_sizes(classes):
    teacher, student = models("vit")
    lively(teacher).reset_classifier(classes)
    teacher.double().norm.weight.data *= 4
    images = images_for(teacher)
    student.load_state_dict(
        select_weights(teacher, student, element_selection="project", calibration=images), strict=False
    )
    with torch.no_grad():
        ours, theirs = (
            model.eval().forward_head(model.forward_features(images), pre_logits=True).double().square().mean()
            for model in (student.double(), teacher)
        )
    assert 0.8 < ours / theirs < 1.25


def test_a_teacher_whose_activations_overflow_is_refused():
    teacher, student = (model.float() for model in models("vit"))
    teacher.blocks[0].mlp.fc1.weight.data.fill_(1e38)
    with pytest.raises(InputError, match="blocks.0.mlp.fc2.weight takes is not finite"):
        select_weights(teacher, student, element_selection="greedy", calibration=images_for(teacher).float())
