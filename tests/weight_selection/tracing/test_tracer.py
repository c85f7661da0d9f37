"""Following neurons through single operations, in modules of a few lines."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from weight_selection.tracing.groups import find_groups
from weight_selection.tracing.trace import trace
from weight_selection.tracing.tracer import Untraceable

CHANNELS = 16
IMAGES = (torch.empty(1, 3, 8, 8),)


class Toy(nn.Module):
    """A stem, whatever ``forward`` does with it, and a head."""

    def __init__(self, operation, **modules):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 1)
        self.a = nn.Conv2d(3, CHANNELS, 1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.operation = operation

    def forward(self, images):
        return self.operation(self, self.stem(images), self.a(images))


def labels(operation, **modules):
    """{key: label of each index of each dimension}."""
    traced = trace(Toy(operation, **modules), IMAGES)
    return {key: [traced.labels.find(dim).tolist() for dim in dims] for key, dims in traced.dims.items()}


def parts(key, operation, **modules):
    """For each dimension of a tensor the shapes of its parts, or None for positions."""
    found = find_groups(trace(Toy(operation, **modules), IMAGES)).slices[key]
    return [dim and [part.indices.shape for part in dim] for dim in found]


def into_zeros(model, x, y):
    out = torch.zeros_like(x)
    out += y
    return x + out


def written_over(model, x, y):
    return x + torch.empty_like(x).copy_(y)


def written_row_by_row(model, x, y):
    out = torch.empty_like(x)
    for row in range(x.shape[2]):
        out[:, :, row] = y[:, :, row]
    return x + out


def written_in_halves(model, x, y):
    out = x.new_empty(len(x), 2 * CHANNELS, *x.shape[2:])
    out[:, :CHANNELS], out[:, CHANNELS:] = x, y
    return out[:, :CHANNELS] + out[:, CHANNELS:]


@pytest.mark.parametrize(
    "operation",
    [
        lambda model, x, y: x + y,
        lambda model, x, y: x * y.sigmoid(),
        lambda model, x, y: torch.maximum(x, y.flip(2)),
        lambda model, x, y: x + y.permute(0, 2, 3, 1).roll(1, 2).permute(0, 3, 1, 2),
        lambda model, x, y: torch.stack((x, y), 1).mean((3, 4))[:, 0] + x.mean((2, 3)) + y.mean((2, 3)),
        lambda model, x, y: torch.cat((x, y), dim=2),  # one beneath the other: the same features of other places
        lambda model, x, y: torch.addcmul(x, y, y),
        lambda model, x, y: F.glu(torch.cat((x, y), dim=1), 1),
        lambda model, x, y: torch.where(x > 0, x, y),
        into_zeros,
        written_over,
        written_row_by_row,
        written_in_halves,
    ],
)
def test_what_meets_is_the_same(operation):
    found = labels(operation)
    assert found["stem.weight"][0] == found["stem.bias"][0] == found["a.weight"][0]
    assert len(set(found["a.weight"][0])) == CHANNELS


def test_what_does_not_meet_is_not():
    found = labels(lambda model, x, y: torch.cat((x, y), dim=1))
    assert not set(found["stem.weight"][0]) & set(found["a.weight"][0])


def test_what_was_read_of_a_tensor_keeps_its_neurons_when_that_is_written_again():
    def operation(model, x, y):
        out = x.new_empty(len(x), 2 * CHANNELS, *x.shape[2:])
        out[:, :CHANNELS], out[:, CHANNELS:] = x, x
        earlier = out[:, :CHANNELS].relu()
        out[:, :CHANNELS] = y
        return model.next(earlier).sum() + out.sum()

    found = labels(operation, next=nn.Conv2d(CHANNELS, 5, 1))
    assert found["next.weight"][1] == found["stem.weight"][0] != found["a.weight"][0]


def test_a_product_takes_what_comes_in_and_gives_what_comes_out():
    found = labels(lambda model, x, y: model.fc(x.mean((2, 3))) + y.mean((2, 3)), fc=nn.Linear(CHANNELS, CHANNELS))
    assert found["fc.weight"][1] == found["stem.weight"][0]
    assert found["fc.weight"][0] == found["fc.bias"][0] == found["a.weight"][0]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_matrix_that_is_repeated_for_each_sample_is_noted_to_be_summed_over(batch):
    layer = nn.TransformerEncoderLayer(CHANNELS, 2, 24, norm_first=True, batch_first=True)
    found = trace(layer, (torch.empty(batch, 5, CHANNELS),)).sums
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert found == dict.fromkeys(names, 1)


def test_concatenated_features_are_parts_of_what_reads_them():
    def operation(model, x, y):
        return model.next(torch.cat((x, y), dim=1))

    assert parts("next.weight", operation, next=nn.Conv2d(2 * CHANNELS, 5, 1))[1] == [(CHANNELS,), (CHANNELS,)]


def test_channels_that_are_shuffled_are_told_apart():
    def operation(model, x, y):
        both = torch.stack((x, y), dim=2).flatten(1, 2)  # x0 y0 x1 y1 ...
        return model.next(both)

    traced = trace(Toy(operation, next=nn.Conv2d(2 * CHANNELS, 5, 1)), IMAGES)
    first, second = find_groups(traced).slices["next.weight"][1]
    assert first.indices.tolist() == list(range(0, 2 * CHANNELS, 2))
    assert second.indices.tolist() == list(range(1, 2 * CHANNELS, 2))


def test_groups_of_a_convolution_are_blocks_on_both_sides():
    def operation(model, x, y):
        return model.next(x)

    grouped = nn.Conv2d(CHANNELS, 24, 3, groups=4)
    assert parts("stem.weight", operation, next=grouped)[0] == [(4, 4)]
    assert parts("next.weight", operation, next=grouped) == [[(4, 6)], [(4,)], None, None]


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_depthwise_convolution_gives_what_it_takes(kind):
    found = labels(lambda model, x, y: model.next(x), next=kind(CHANNELS, CHANNELS, 3, groups=CHANNELS))
    assert found["next.weight"][0] == found["next.bias"][0] == found["stem.weight"][0]


def test_query_and_key_are_the_same_and_value_is_what_the_projection_reads():
    def operation(model, x, y):
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = model.qkv(tokens).view(1, 64, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return model.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) + tokens

    modules = {"qkv": nn.Linear(CHANNELS, 48), "proj": nn.Linear(16, CHANNELS)}
    found = labels(operation, **modules)
    q, k, v = (found["qkv.weight"][0][16 * part : 16 * part + 16] for part in range(3))
    assert q == k == found["qkv.bias"][0][:16]
    assert v == found["proj.weight"][1] and not set(v) & set(q)
    assert found["proj.weight"][0] == found["stem.weight"][0] == found["qkv.weight"][1]
    assert parts("qkv.weight", operation, **modules)[0] == [(16,)] * 3  # heads meet nobody: no blocks


def test_rotary_pairs_stay_together_in_heads_of_the_same_size():
    angles = torch.rand(64, 8)

    def operation(model, x, y):
        q, k = model.qk(x.flatten(2).transpose(1, 2)).view(1, 64, 2, 2, 8).permute(2, 0, 3, 1, 4)
        turned = torch.stack((-q[..., 1::2], q[..., ::2]), -1).reshape(q.shape)
        constant = angles.to(q.device)
        return (q * constant.cos() + turned * constant.sin()) @ k.transpose(-1, -2)

    qk = nn.Linear(CHANNELS, 32)
    pairs = labels(operation, qk=qk)["qk.weight"][0][:16]
    assert pairs[::2] == pairs[1::2] and len(set(pairs)) == 8
    neurons = find_groups(trace(Toy(operation, qk=qk), IMAGES))
    assert {part.indices.shape for part in neurons.slices["qk.weight"][0]} == {(2, 4)}
    assert neurons.groups[neurons.slices["qk.weight"][0][0].group].fixed == (False, True)


def test_positions_are_positions():
    def operation(model, x, y):
        tokens = x.flatten(2).transpose(1, 2) + model.table.weight  # (1, 64, CHANNELS)
        return model.mix(tokens.transpose(1, 2)).transpose(1, 2) + tokens

    modules = {"table": nn.Linear(CHANNELS, 64, bias=False), "mix": nn.Linear(64, 64)}
    assert parts("table.weight", operation, **modules) == [None, [(CHANNELS,)]]
    assert parts("mix.weight", operation, **modules) == [None, None]


def test_what_is_pooled_with_its_neighbours_cannot_be_chosen_from():
    found = parts("stem.weight", lambda model, x, y: F.avg_pool1d(x.flatten(2).transpose(1, 2), 3, 1, 1))
    assert found[0] is None


def test_branches_that_are_summed_are_the_same():
    def operation(model, x, y):
        return model.next(torch.stack((x, y), dim=1).sum(1))

    neurons = find_groups(trace(Toy(operation, next=nn.Conv2d(CHANNELS, 5, 1)), IMAGES))
    space = neurons.slices["stem.weight"][0][0].group
    assert neurons.slices["a.weight"][0][0].group == neurons.slices["next.weight"][1][0].group == space


def test_tensors_that_are_not_used_are_known_to_be_so():
    unused = find_groups(trace(Toy(lambda model, x, y: x, idle=nn.Linear(3, 4)), IMAGES)).unused
    assert unused == {"idle.weight", "idle.bias"}


def overwritten(model, x, y):
    out = x.clone()
    out[:, :4] = y[:, :4]
    return out


def written_in_part_again(model, x, y):
    out = torch.empty_like(x)
    out[:, :4] = x[:, :4]
    out.copy_(y)
    out[:, 4:] = x[:, 4:]
    return out


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (overwritten, "a part of a tensor is written over"),
        (written_in_part_again, "a part of a tensor is written over"),
        (lambda model, x, y: torch.add(x, y, out=torch.empty_like(x)), "add.out is no operation"),
        (lambda model, x, y: model.slide(x.mean((2, 3)).unsqueeze(1)), "slides along neurons"),
        (lambda model, x, y: x.cumsum(1), "no operation that neurons can be followed through"),
        (lambda model, x, y: x.view(1, 7), r"its forward pass of \(1, 3, 8, 8\) images fails"),
    ],
)
def test_what_cannot_be_followed_is_refused(operation, reason):
    with pytest.raises(Untraceable, match=reason):
        trace(Toy(operation, slide=nn.Conv1d(1, 1, 3, padding=1)), IMAGES)


def test_a_trace_leaves_the_model_as_it_was():
    model = Toy(lambda model, x, y: x).double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, IMAGES)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
