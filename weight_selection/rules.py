"""The rules: which of the teacher's layers, and which elements of a tensor, a student keeps (paper, 3.1 and 3.2)."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from weight_selection.errors import InputError
from weight_selection.options import CONSISTENT, ELEMENT_SELECTION, LAYER_SELECTION


def uniform_indices(t: int, s: int) -> torch.Tensor:
    """``s`` evenly spaced of ``t`` indices: every (t/s)-th, or rounded points of a grid if s does not divide t."""
    if t % s == 0:
        return torch.arange(s) * (t // s)
    return torch.linspace(0, t - 1, s).round().long()


def random_indices(t: int, s: int, *entropy: int) -> torch.Tensor:
    """A sorted draw of ``s`` of ``t`` indices without replacement, the same whenever the arguments are."""
    draw = np.random.RandomState(np.random.SeedSequence((t, s, *entropy)).generate_state(4))
    return torch.from_numpy(np.sort(draw.permutation(t)[:s]))


def layer_indices(method: str, t: int, s: int) -> list:
    """For each of the student's ``s`` layers the one of the teacher's ``t`` that it starts from (3.1, Appendix B).

    ``quadratic`` goes beyond the paper. It is for ``project`` and ``greedy``, which make up for skipped layers. A later
    layer is a smaller loss, so layer i starts from the teacher's layer t (i/s)^2, and from layer i at least.
    """
    if method not in LAYER_SELECTION:
        raise InputError(f"--layer_selection {method}: choose one of {', '.join(LAYER_SELECTION)}")
    if method == "uniform":
        return uniform_indices(t, s).tolist()
    if method == "quadratic":
        return [max(i, t * i * i // (s * s)) for i in range(s)]
    start = {"first_n": 0, "mid_n": (t - s) // 2, "last_n": t - s}[method]
    return list(range(start, start + s))


def kept_indices(method: str, t: int, s: int, seed: int = 0) -> torch.Tensor:
    """The ``s`` of ``t`` neurons that a rule of ``CONSISTENT`` keeps, ascending, (s,).

    They depend on nothing but the two sizes and the seed. So all tensors that share neurons keep the same ones: the
    paper's consistency (section 3.2).
    """
    if t == s:
        return torch.arange(t)
    if method == "uniform":
        return uniform_indices(t, s)
    if method == "consecutive":
        return torch.arange(s)
    if method == "random":
        return random_indices(t, s, seed)
    raise InputError(f"{method}: keeps other neurons in every tensor; choose one of {', '.join(CONSISTENT)}")


def element_indices(method: str, weight: torch.Tensor, dim: int, s: int, seed: int = 0, name: str = "") -> torch.Tensor:
    """The ``s`` slices of ``weight`` along ``dim`` that the student keeps (section 3.2), ascending, (s,).

    The rules of ``CONSISTENT`` look at nothing but the two sizes. ``random_inconsistent`` draws anew for every ``name``
    and ``dim``; ``l1`` keeps the slices of largest L1 norm.
    """
    if method not in ELEMENT_SELECTION or method == "magnitude":
        raise InputError(f"{method}: does not select slices; choose one of uniform, consecutive, random, l1")
    t = weight.shape[dim]
    if t == s or method in CONSISTENT:
        return kept_indices(method, t, s, seed)
    if method == "random_inconsistent":
        return random_indices(t, s, seed, zlib.crc32(name.encode()), dim)
    norms = weight.movedim(dim, 0).reshape(t, -1).double().abs().sum(dim=1)
    return norms.argsort(descending=True, stable=True)[:s].sort().values


def select_elements(method: str, weight: torch.Tensor, shape: Sequence, seed: int = 0, name: str = "") -> torch.Tensor:
    """Reduce ``weight`` to ``shape``, which is no larger in any dimension, by one of ``ELEMENT_SELECTION``.

    ``magnitude`` keeps the largest entries wherever they are, in their order, and reshapes them (Table 7).
    """
    if method not in ELEMENT_SELECTION:
        raise InputError(f"--element_selection {method}: choose one of {', '.join(ELEMENT_SELECTION)}")
    if method == "magnitude":
        largest = weight.abs().flatten().argsort(descending=True, stable=True)
        kept = largest[: int(np.prod(shape))].sort().values
        return weight.flatten()[kept].reshape(shape)
    picks = [element_indices(method, weight, dim, size, seed, name) for dim, size in enumerate(shape)]
    for dim, pick in enumerate(picks):
        weight = weight.index_select(dim, pick.to(weight.device))
    return weight
