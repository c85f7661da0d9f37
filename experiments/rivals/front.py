"""FRONT (2603.07523): the low frequencies of the teacher's tensors are the student's tensors.

Each tensor is normalised by its mean and deviation, transformed by the discrete cosine transform along rows and
columns, cut to the student's size, and transformed back. Kernels are matrices of (outputs x inputs, pixels). The
transform along layers changes nothing where both models have equally many.
"""

import math

import torch

from rivals.arms import Pair, without_classifier


def cosines(size: int) -> torch.Tensor:
    """The orthonormal DCT-II as a matrix (size, size): frequencies in rows."""
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    basis = torch.cos(torch.arange(size)[:, None] * place) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def resized(values: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Cut one dimension in the frequency domain."""
    down = cosines(size).T @ cosines(values.shape[dim])[:size]
    return (values.movedim(dim, -1) @ down.T).movedim(-1, dim)


def front(pair: Pair) -> dict:
    """The low frequencies of every tensor."""
    own = pair.teacher.state_dict()
    weights = {}
    for key, value in without_classifier(pair.student).items():
        shape = (value.shape[0] * value.shape[1], -1) if value.ndim == 4 else value.squeeze().shape
        theirs = own[key].double()
        theirs = theirs.reshape(theirs.shape[0] * theirs.shape[1], -1) if theirs.ndim == 4 else theirs.squeeze()
        mean, deviation = theirs.mean(), theirs.std()
        theirs = (theirs - mean) / (deviation + 1e-8)
        for dim, size in enumerate(value.reshape(shape).shape):
            theirs = resized(theirs, dim, size)
        weights[key] = (theirs * deviation + mean).reshape(value.shape).float()
    return weights
