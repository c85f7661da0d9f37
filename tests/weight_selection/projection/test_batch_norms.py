"""Batch normalisations of a projected student: in training it computes what it does in evaluation."""

import copy

import pytest
import torch
import torch.nn as nn

from architectures import lively, models
from helpers import images_for, random
from weight_selection import select_weights
from weight_selection.projection.batch_norms import fit_batch_norm, mean_given
from weight_selection.projection.equations import Variances


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_training_and_evaluation_compute_the_same_from_the_calibration_images(name):
    teacher, student = models(name)
    teacher, student, images = lively(teacher), student.double(), images_for(teacher, 8, 64)
    first = select_weights(teacher, student, element_selection="greedy", calibration=images)
    student.load_state_dict(first, strict=False)
    features = []
    for training in (False, True):
        student.train(training)
        with torch.no_grad():
            features.append(copy.deepcopy(student).forward_features(images))
    assert features[0].std() > 1e-3
    torch.testing.assert_close(features[1], features[0], rtol=1e-3, atol=1e-4 * features[0].abs().max().item())


def test_a_batch_normalisation_keeps_its_deviations_and_gets_the_wanted_mean():
    norm, x, wanted = lively(nn.BatchNorm2d(3)), random(4, 3, 5, 5) * 7 + 2, random(3)
    before, taken = norm(x), Variances()
    rows = x.movedim(1, -1).flatten(0, 2)
    taken.add(rows)
    torch.testing.assert_close(mean_given(norm, rows.mean(0)), before.mean((0, 2, 3)))
    fit_batch_norm(norm, taken, wanted)
    expected = before - before.mean((0, 2, 3), keepdim=True) + wanted.view(3, 1, 1)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.train()(x), expected)
