"""A forward pass may look at the values of tensors that depend on no weight, and at no others."""

import pytest
import torch
import torch.nn as nn

from weight_selection.tracing.trace import trace
from weight_selection.tracing.tracer import Untraceable

MASK = torch.tensor([[1, 1, 1, 0]])


class Chooses(nn.Module):
    """Which of two layers runs depends on a mask, as ``choose`` (features, mask) says."""

    def __init__(self, choose):
        super().__init__()
        self.choose, self.yes, self.no = choose, nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x, mask):
        return self.yes(x) if self.choose(x @ self.yes.weight.mT, mask) else self.no(x)


def chosen(choose):
    """The layer that ran."""
    found = trace(Chooses(choose), (torch.zeros(1, 4, 6, device="meta"), MASK)).met
    return "yes" if "yes.bias" in found else "no"


def test_inputs_are_not_written_into():
    class Shifts(nn.Linear):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    x = torch.zeros(2, 6)
    trace(Shifts(6, 3), (x,))
    assert x.eq(0).all()


def zero_first(mask):
    mask = mask.clone()
    mask.view(-1)[0] = 0
    return mask


@pytest.mark.parametrize(
    ("choose", "layer"),
    [
        (lambda features, mask: mask.all(), "no"),
        (lambda features, mask: int(mask.sum()) == 3, "yes"),
        (lambda features, mask: mask.equal(MASK.to(mask.device)), "yes"),
        (lambda features, mask: mask.nonzero().shape == (3, 2), "yes"),
        (lambda features, mask: zero_first(mask).sum() == 2, "yes"),
        (lambda features, mask: torch.ones_like(features[0, 0]).sum() == 3, None),
        (lambda features, mask: torch.arange(features.shape[1], device=features.device)[-1] == 3, "yes"),
        (lambda features, mask: features.sum() > 0, None),
        (lambda features, mask: (mask.sum() * features).sum() > 0, None),
        (lambda features, mask: mask.float().clone().copy_(features[..., 0]).sum() > 0, None),
        (lambda features, mask: mask.float().clone().mul_(features[..., 0]).view(-1)[0] > 0, None),
        (lambda features, mask: torch.rand(2, device=features.device).sum() > 3, None),
    ],
)
def test_values_are_known_where_no_weight_and_no_chance_decides_them(choose, layer):
    if layer is not None:
        assert chosen(choose) == layer
    else:
        with pytest.raises(Untraceable, match="looks at the values of tensors, which a trace does not have"):
            chosen(choose)
