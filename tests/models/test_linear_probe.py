"""Linear probing: what is frozen, what is trained, and MAE's optimiser for it."""

import pytest
import torch

from helpers import assert_same, differ, read_checkpoint
from models.initialization import make_linear_probe
from optim_factory import create_optimizer
from training.options import parse_args
from training.setup import build_model
from weight_selection.errors import InputError
from weight_selection.sources.timm_models import create_model

PROBE = "--linear_probe true --opt lars --weight_decay 0 --mixup 0 --cutmix 0 --smoothing 0"


def is_head(key):
    return key.startswith("head.")


def test_only_the_classifier_changes(train, tmp_path):
    train(f"{PROBE} --lr 1 --output_dir {tmp_path}")
    first, last = (read_checkpoint(tmp_path, epoch)["model"] for epoch in (0, 1))
    assert_same(*({key: value for key, value in state.items() if not is_head(key)} for state in (first, last)))
    assert {key for key in last if is_head(key) and not torch.equal(first[key], last[key])} == {
        f"head.{name}" for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias")
    }


def test_frozen_features_are_those_of_the_weights_given(train, tmp_path):
    train(f"--output_dir {tmp_path}/trained")
    train(f"{PROBE} --finetune {tmp_path}/trained/checkpoint-1.pth --output_dir {tmp_path}/probe")
    trained, probe = (read_checkpoint(tmp_path / name, 1)["model"] for name in ("trained", "probe"))
    assert_same(*({key: value for key, value in state.items() if not is_head(key)} for state in (trained, probe)))


def test_a_probe_can_be_interrupted_and_evaluated(train, interrupted, tmp_path, capsys):
    train(f"{PROBE} --output_dir {tmp_path}/whole")
    interrupted(1, f"{PROBE} --output_dir {tmp_path}/parts")
    train(f"{PROBE} --output_dir {tmp_path}/parts")
    whole, parts = (read_checkpoint(tmp_path / name, 1)["model"] for name in ("whole", "parts"))
    assert_same(parts, whole)
    capsys.readouterr()
    train(f"--linear_probe true --eval true --resume {tmp_path}/whole/checkpoint-1.pth")
    assert "acc1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_probe_is_a_linear_function_of_normalised_features(name):
    model = create_model(name, num_classes=4)
    features = create_model(name, num_classes=0)
    features.load_state_dict({key: model.state_dict()[key] for key in features.state_dict()})
    make_linear_probe(model, name)
    images = torch.randn(6, 3, 96 if name != "test_vit" else 160, 96 if name != "test_vit" else 160)
    batch = features.eval()(images)
    linear = model.get_classifier()[1]
    assert 0 < linear.weight.std() < 0.02 and not linear.bias.any()
    expected = linear((batch - batch.mean(0)) / (batch.var(0, unbiased=False) + 1e-6).sqrt())
    torch.testing.assert_close(model.eval().get_classifier().train()(batch), expected, rtol=1e-4, atol=1e-5)
    assert [key for key, value in model.named_parameters() if value.requires_grad] == [
        f"{model.pretrained_cfg['classifier']}.1.{kind}" for kind in ("weight", "bias")
    ]


def test_lars_without_weight_decay_is_maes():
    """A matrix moves by lr * 0.001 |w| / |g| g, a vector by lr * g, as in MAE's linear probing."""
    model = create_model("test_vit", num_classes=4)
    make_linear_probe(model, "test_vit")
    optimizer = create_optimizer(model, parse_args(f"{PROBE} --lr 2".split()))
    linear = model.get_classifier()[1]
    before, generator = (linear.weight.clone(), linear.bias.clone()), torch.Generator().manual_seed(0)
    for parameter in linear.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    trust = 0.001 * before[0].norm() / linear.weight.grad.norm()
    torch.testing.assert_close(linear.weight, before[0] - 2 * trust * linear.weight.grad)
    torch.testing.assert_close(linear.bias, before[1] - 2 * linear.bias.grad)


def test_a_probe_starts_from_its_own_classifier(train, tmp_path):
    """The classifier that the weights come with is dropped."""
    train(f"--output_dir {tmp_path}")
    small = "--model vit_tiny --model_kwargs embed_dim=32 depth=2 num_heads=2 patch_size=4 --input_size 16"
    args = parse_args(f"--linear_probe true --finetune {tmp_path}/checkpoint-1.pth {small}".split())
    probe = build_model(args, classes=3)
    assert differ({"w": probe.head[1].weight}, {"w": read_checkpoint(tmp_path, 1)["model"]["head.weight"]})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--drop_path 0.1", "--drop_path 0.1: features are frozen under --linear_probe true; set it to 0"),
        ("--layer_decay 0.5", "--layer_decay 0.5: has no effect with --linear_probe true"),
        ("--head_init_scale 2", "--head_init_scale 2.0: has no effect with --linear_probe true"),
    ],
)
def test_options_of_the_frozen_part_are_refused(words, message):
    with pytest.raises(InputError) as refusal:
        parse_args(f"--linear_probe true {words}".split())
    assert message in str(refusal.value)
