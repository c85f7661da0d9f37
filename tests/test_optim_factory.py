"""Schedules and parameter groups of the recipe, and what a step of training really applies of them."""

import numpy as np
import pytest
import torch

from distributed.program import Launch
from optim_factory import cosine_schedule, create_optimizer
from training.options import parse_args
from training.setup import build_model, build_train_state
from weight_selection.errors import InputError
from weight_selection.sources.timm_models import create_model

# ViT-T on CIFAR-100 at batch 512: 97 steps an epoch, 300 epochs of which 50 are warm-up, peak 2e-3.
RECIPE = {"base": 2e-3, "final": 1e-6, "total_steps": 300 * 97, "warmup_steps": 50 * 97}

SMALL_MODELS = {
    "vit": "--model vit_tiny --input_size 16 --model_kwargs embed_dim=32 depth=4 num_heads=2 patch_size=4",
    "convnext": "--model convnext_femto --model_kwargs depths=(1,1,3,1) dims=(8,8,16,16)",
}


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.0),
        (1, 4.124561765e-07),
        (97, 4.000824912e-05),
        (4849, 2e-3),
        (4850, 2e-3),
        (4851, 1.9999999916e-03),
        (15000, 1.2534525815e-03),
    ],
)
def test_learning_rate_of_the_recipe_step_by_step(step, value):
    schedule = cosine_schedule(**RECIPE)
    assert len(schedule) == 29100
    assert schedule[step] == pytest.approx(value, rel=1e-9, abs=0)


def test_cosine_falls_all_the_way_and_ends_just_above_min_lr():
    cosine = cosine_schedule(**RECIPE)[RECIPE["warmup_steps"] :]
    assert (np.diff(cosine) < 0).all()
    assert 1e-6 < cosine[-1] < 1.0001e-6


def test_schedule_without_warm_up_starts_at_the_peak():
    schedule = cosine_schedule(1.0, 0.0, total_steps=4)
    assert schedule == pytest.approx([1.0, 0.5 + np.sqrt(0.125), 0.5, 0.5 - np.sqrt(0.125)])


def test_warm_up_may_take_the_whole_run_but_not_more():
    assert cosine_schedule(1.0, 0.0, total_steps=5, warmup_steps=5) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    with pytest.raises(InputError, match="6 warm-up steps.*only 5"):
        cosine_schedule(1.0, 0.0, total_steps=5, warmup_steps=6)


def by_name(model, optimizer, key):
    """The value that each parameter's group has under ``key``, by the parameter's name."""
    values = {id(parameter): group[key] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: values[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("name", "without", "decayed"), [("vit_tiny", 102, 50), ("convnext_femto", 87, 41)])
def test_weight_decay_spares_vectors_position_embedding_and_class_token(name, without, decayed):
    model = create_model(name, device="meta")
    decay = by_name(model, create_optimizer(model, parse_args(["--weight_decay", "0.07"])), "weight_decay")
    assert sorted(decay.values()) == [0.0] * without + [0.07] * decayed
    for key, parameter in model.named_parameters():
        assert (decay[key] == 0) == (parameter.ndim == 1 or key in ("pos_embed", "cls_token")), key


def test_an_optimiser_that_cannot_be_made_is_refused():
    model = create_model("vit_tiny", device="meta")
    with pytest.raises(InputError, match="--opt sgd: cannot be made with momentum 0: Nesterov"):
        create_optimizer(model, parse_args(["--opt", "sgd", "--momentum", "0"]))
    with pytest.raises(InputError, match="--opt adahessian: needs second derivatives"):
        create_optimizer(model, parse_args(["--opt", "adahessian"]))


def small_state(family, words):
    """TrainState of a run of one epoch of ten steps, four of them warm-up."""
    options = parse_args(f"{SMALL_MODELS[family]} --device cpu --epochs 1 --warmup_steps 4 {words}".split())
    model = build_model(options, classes=3)
    return build_train_state(options, model, None, torch.device("cpu"), Launch(), None, steps_per_epoch=10, classes=3)


VIT_LAYERS = ["cls_token pos_embed patch_embed.", "blocks.0.", "blocks.1.", "blocks.2.", "blocks.3. norm.", "head."]
CONVNEXT_LAYERS = [
    "stem.",
    *(f"stages.{stage}.blocks.{block}." for stage, block in ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0))),
    "head.",
]


@pytest.mark.parametrize(("family", "layers"), [("vit", VIT_LAYERS), ("convnext", CONVNEXT_LAYERS)])
def test_layer_decay_gives_deeper_layers_a_higher_learning_rate(family, layers):
    state = small_state(family, "--layer_decay 0.5 --lr 0.1")
    scale = by_name(state.model, state.optimizer, "lr_scale")
    ladder = [{value for key, value in scale.items() if key.startswith(tuple(layer.split()))} for layer in layers]
    assert all(len(layer) == 1 for layer in ladder), "one layer, one learning rate"
    ladder = [layer.pop() for layer in ladder]
    assert ladder == sorted(set(ladder)), "every layer is above the one before it"
    assert ladder[-1] == max(scale.values()) == 1
    for step in (2, 7):  # in the warm-up, and after it
        state.set_schedule(step)
        applied = by_name(state.model, state.optimizer, "lr")
        assert applied == pytest.approx({key: state.lr_schedule[step] * scale[key] for key in scale})
        assert max(applied.values()) == state.lr_schedule[step] > 0


def test_weight_decay_follows_its_own_cosine_and_spared_tensors_stay_spared():
    state = small_state("vit", "--weight_decay 0.05 --weight_decay_end 0.45")
    spared = {key for key, value in by_name(state.model, state.optimizer, "weight_decay").items() if value == 0}
    for step, expected in ((0, 0.05), (5, 0.25)):
        state.set_schedule(step)
        decay = by_name(state.model, state.optimizer, "weight_decay")
        assert {key for key, value in decay.items() if value == 0} == spared
        assert [value for key, value in decay.items() if key not in spared] == pytest.approx(
            [expected] * (len(decay) - len(spared))
        )
