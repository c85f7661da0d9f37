"""Carrying out a plan: every student tensor is cut out of the teacher's."""

import itertools
from collections.abc import Mapping

import numpy as np
import torch

from weight_selection.errors import InputError
from weight_selection.options import CONSISTENT
from weight_selection.plan import Plan, PlanEntry
from weight_selection.rules import select_elements

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)  # int64: counted batches


def apply_plan(plan: Plan, weights: Mapping, option: str = "teacher") -> dict:
    """Carry out a plan by its rule of element selection.

    Args:
        plan: of ``plan_selection``.
        weights: the teacher's state_dict. If it reads a tensor only when it is asked for, no more memory is needed than
            for the largest one.
        option: where the weights came from, for errors.

    Returns:
        The student's state_dict, in the student's order and the teacher's dtype, without what is not selected. The keys
        of a tied tensor have one tensor.

    Raises:
        InputError: as ``checked_weight``.
    """
    made = {}
    for key, entry in plan.selected.items():
        if key in plan.tied:
            continue
        weight = checked_weight(entry.teacher_key, entry.teacher_shape, weights.get(entry.teacher_key), option)
        weight = _reshaped(entry, weight)
        keep = _keep_group_neurons if plan.element_selection in CONSISTENT else _choose_per_tensor
        made[key] = keep(plan, entry, weight)
    return {key: made[plan.tied.get(key, key)] for key in plan.selected}


def checked_weight(key: str, shape: tuple, weight: torch.Tensor | None, option: str) -> torch.Tensor:
    """A teacher's weight; InputError unless it is there, of that shape, of a known kind of numbers and finite."""
    if weight is not None and (not isinstance(weight, torch.Tensor) or weight.is_meta):
        kind = "a tensor on the meta device" if isinstance(weight, torch.Tensor) else f"a {type(weight).__name__}"
        raise InputError(f"{option}: {key} is {kind}; give tensors with values")
    if weight is None or tuple(weight.shape) != shape:
        found = "absent" if weight is None else tuple(weight.shape)
        raise InputError(
            f"{option}: {key} is {found}, {shape} is needed; give this teacher's weights, or "
            "for a classifier set --teacher_kwargs num_classes=N to the file's, or leave out --include_head"
        )
    if weight.dtype not in DTYPES:
        raise InputError(f"{option}: {key} is of {weight.dtype}; convert it to float32")
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():  # NaN is both least and greatest
        raise InputError(f"{option}: {key} has values that are not finite; give other weights")
    return weight.detach()


def _reshaped(entry: PlanEntry, weight):
    """Resample positions; turn a linear layer into a 1x1 convolution, or the reverse."""
    if entry.resampling is not None:
        weight = entry.resampling.apply(weight)
    if weight.ndim < len(entry.shape):
        return weight[:, :, None, None]
    return weight[:, :, 0, 0] if weight.ndim > len(entry.shape) else weight


def _keep_group_neurons(plan, entry, weight):
    """Along every dimension, look up the kept indices of the groups in it: consistent by construction."""
    kept = weight
    for dim in entry.slices:
        indices = plan.kept(entry, dim)
        if not np.array_equal(indices, np.arange(weight.shape[dim])):
            kept = kept.index_select(dim, torch.from_numpy(indices).to(weight.device))
    return kept.contiguous() if kept is not weight else weight.clone(memory_format=torch.contiguous_format)


def _choose_per_tensor(plan, entry, weight):
    """Let the rule look at the values of every tensor, inside each combination of slices by itself."""
    out = weight.new_empty(entry.shape)
    every = [entry.slices.get(dim, (None,)) for dim in range(weight.ndim)]
    for number, pairs in enumerate(itertools.product(*every)):
        taken, large, small, places = weight, [], [], []
        for dim, pair in enumerate(pairs):
            if pair is None:  # a dimension of positions
                large.append(weight.shape[dim])
                small.append(weight.shape[dim])
                places.append(np.arange(weight.shape[dim]))
                continue
            taken = taken.index_select(dim, torch.from_numpy(pair.teacher.reshape(-1)).to(weight.device))
            large += pair.teacher.shape
            small += pair.student.shape
            places.append(pair.student.reshape(-1))
        name = f"{entry.key}:{number}"
        chosen = select_elements(plan.element_selection, taken.reshape(large), small, plan.seed, name)
        out[np.ix_(*places)] = chosen.reshape([len(place) for place in places])
    return out
