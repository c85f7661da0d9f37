"""A classifier in closed form: scikit-learn's ridge regression, the choice of ridge and scale, several processes."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from weight_selection import InputError, fit_classifier
from weight_selection.classifier import RIDGES, RidgeSums

CLASSES, IMAGES = 3, 300


class Net(nn.Module):
    """A small network whose features are a fixed function of the input."""

    def __init__(self, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.5))
        self.head = nn.Linear(12, CLASSES, bias=bias)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def images():
    """Inputs around one centre for each class, in an order in which every third is of one class, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % CLASSES
    centres = torch.randn(CLASSES, 6, generator=generator)
    return centres[labels] + torch.randn(IMAGES, 6, generator=generator), labels


def in_batches(images, size=64):
    inputs, labels = images
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def test_the_classifier_is_that_of_ridge_regression(images):
    torch.manual_seed(0)
    net = Net().train()
    net.body[0].eval()
    body = {key: value.clone() for key, value in net.body.state_dict().items()}
    facts = fit_classifier(net, in_batches(images), CLASSES)
    assert net.body.training and not net.body[0].training
    assert all(torch.equal(value, body[key]) for key, value in net.body.state_dict().items())
    features = net.eval().body(images[0]).detach().double()
    variance = features.var(0, unbiased=False).mean().item()
    ridge = Ridge(alpha=facts["ridge"] * variance * IMAGES).fit(features.numpy(), F.one_hot(images[1]).double().numpy())
    np.testing.assert_allclose(net.head.weight.detach(), facts["scale"] * ridge.coef_, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(net.head.bias.detach(), facts["scale"] * ridge.intercept_, rtol=1e-3, atol=1e-5)
    assert facts["ridge"] in RIDGES and facts["images"] == IMAGES
    accuracy = (net(images[0]).argmax(1) == images[1]).double().mean()
    assert abs(100 * accuracy - facts["held_out_acc1"]) < 15, "the held-out images are like the others"
    assert facts["held_out_loss"] < np.log(CLASSES)


def test_logits_of_classes_that_are_easy_to_tell_apart_stay_small():
    """A loss of zero on ten held-out images would call for logits without a bound."""
    labels = torch.arange(50) % CLASSES
    sums = RidgeSums(CLASSES)
    sums.add(F.one_hot(labels).double() + 0.01 * torch.randn(50, CLASSES, generator=torch.Generator()), labels)
    fitted = sums.solve()
    held = sum(len(part) for _, part in sums.held)
    assert fitted.held_out_acc1 == 100 and 0.5 / held < fitted.held_out_loss <= 1 / held
    logits = torch.eye(CLASSES) @ fitted.weight.T + fitted.bias
    assert torch.equal(logits.argmax(1), torch.arange(CLASSES)) and logits.std(1).max() < 5
    assert fitted.ridge >= 1, "of all that tell them apart, the one that trusts small differences least"


def test_the_classifier_may_be_named_by_a_module_around_it(images):
    net = Net()
    net.head = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, CLASSES))
    before = net.head[1].weight.clone()
    assert fit_classifier(net, in_batches(images), CLASSES, classifier="head")["images"] == IMAGES
    assert not torch.equal(net.head[1].weight, before)


def test_labels_may_be_in_a_dict_with_the_inputs(images):
    torch.manual_seed(0)
    nets = [Net() for _ in range(3)]
    expected = fit_classifier(nets[0], in_batches(images), CLASSES)
    nets[1].body.load_state_dict(nets[0].body.state_dict())
    named = [{"x": x, "labels": y, "text": ["a"] * len(y)} for x, y in in_batches(images)]
    assert fit_classifier(nets[1], named, CLASSES) == expected
    assert torch.equal(nets[1].head.weight, nets[0].head.weight)
    with pytest.raises(InputError, match="batches: one has no labels; give"):
        fit_classifier(nets[2], images[:1], CLASSES)


def test_images_shared_out_give_the_same_classifier(images):
    whole = RidgeSums(CLASSES)
    for inputs, labels in in_batches(images):
        whole.add(inputs, labels)
    parts = [RidgeSums(CLASSES, first, 2) for first in range(2)]
    for first, part in enumerate(parts):
        for inputs, labels in in_batches([values[first::2] for values in images]):
            part.add(inputs, labels)
    total = RidgeSums(CLASSES)
    total.add_all(parts)
    ours, theirs = total.solve(), whole.solve()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.held_out_loss, theirs.held_out_loss)
    assert (ours.ridge, ours.scale, ours.images) == (theirs.ridge, theirs.scale, IMAGES)


def test_features_of_one_class_or_constant_features_do_no_harm():
    net = Net(bias=False)
    nn.init.zeros_(net.body[0].weight)
    facts = fit_classifier(net, [(torch.randn(40, 6), torch.arange(40) % CLASSES)], CLASSES)
    assert net.head.weight.isfinite().all() and facts["held_out_loss"] == pytest.approx(np.log(CLASSES), abs=0.1)


def test_what_cannot_be_fitted_is_refused(images):
    net = Net()
    with pytest.raises(InputError, match="wanted a linear layer of 5 outputs, and the model has none"):
        fit_classifier(net, in_batches(images), 5)
    net.second = nn.Linear(12, CLASSES)
    with pytest.raises(InputError, match="the model has 2: head, second; name one"):
        fit_classifier(net, in_batches(images), CLASSES)
    fit_classifier(net, in_batches(images), CLASSES, classifier="head")
    with pytest.raises(InputError, match="no images"):
        fit_classifier(net, [], CLASSES, classifier="head")
    with pytest.raises(InputError, match=r"gets \(1, 300, 12\), not a vector for each image"):
        fit_classifier(net, [(images[0][None], images[1])], CLASSES, classifier="head")
    with pytest.raises(InputError, match="too few"):
        fit_classifier(net, [(images[0][:2], images[1][:2])], CLASSES, classifier="head")
    for labels in (images[1] + CLASSES, images[1] - 1, images[1].float(), images[1][1:], F.one_hot(images[1])):
        with pytest.raises(
            InputError, match=f"^batches: labels of .* give each a whole number from 0 to {CLASSES - 1}"
        ):
            fit_classifier(net, [(images[0], labels)], CLASSES, classifier="head")
