"""``main.py --classifier_init ridge``: a run starts from a classifier that suits the features of its training."""

import pytest
import timm
import torch

from helpers import read_checkpoint, read_results
from weight_selection.errors import InputError


def test_training_starts_from_the_fitted_classifier_and_records_it(train, interrupted, tmp_path, capsys):
    words = "--classifier_init ridge --model_ema true --lr 1e-9 --min_lr 0 --mixup 0 --cutmix 0"
    train(words, f"--output_dir {tmp_path / 'whole'}")
    assert "classifier fitted to the training images: ridge" in capsys.readouterr().out
    results = read_results(tmp_path / "whole")
    assert results["classifier_init"]["images"] == 48
    assert results["best"]["acc1"] > 80, "the features of a random ViT tell the colours"
    interrupted(1, words, f"--output_dir {tmp_path / 'halted'}")
    train(words, f"--output_dir {tmp_path / 'halted'}")
    assert read_results(tmp_path / "halted")["classifier_init"] == results["classifier_init"]
    ours, theirs = (read_checkpoint(tmp_path / name, "best") for name in ("halted", "whole"))
    assert torch.equal(ours["model"]["head.weight"], theirs["model"]["head.weight"])
    torch.testing.assert_close(ours["model_ema"]["head.weight"], ours["model"]["head.weight"], atol=1e-5, rtol=1e-3)


def test_a_model_with_two_classifiers_is_refused(train, tmp_path):
    model = "--model deit_tiny_distilled_patch16_224 --model_kwargs embed_dim=32 depth=1 num_heads=2 patch_size=4"
    with pytest.raises(
        InputError, match="^--classifier_init ridge: the classifier of deit_tiny_dist.* not a single lin"
    ):
        train(model, f"--classifier_init ridge --output_dir {tmp_path}")


def test_the_classifier_suits_batch_normalisations_in_training(train, tmp_path):
    """Their statistics are not the model's own at first, like those of selected weights. Training brings its own."""
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            value.copy_(torch.rand_like(value).mul(6).sub(3).exp())
    torch.save(state, tmp_path / "first.pth")
    model = f"--model test_resnet --model_kwargs in_chans=3 --finetune {tmp_path / 'first.pth'} --classifier_init ridge"
    words = "--epochs 1 --lr 1e-9 --min_lr 0 --mixup 0 --cutmix 0 --model_ema true --model_ema_eval true"
    train(model, words, f"--output_dir {tmp_path / 'run'}")
    results = read_results(tmp_path / "run")
    assert results["last"]["acc1"] > 80 and results["last_ema"]["acc1"] > 80
