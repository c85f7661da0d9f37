"""The index rules of weight selection: which layers, which neurons, which elements."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from weight_selection.options import ELEMENT_SELECTION, LAYER_SELECTION, SEEDED
from weight_selection.rules import element_indices, layer_indices, select_elements, uniform_indices

SLICING = [method for method in ELEMENT_SELECTION if method != "magnitude"]


@st.composite
def sizes(draw, largest=200):
    """(teacher size, student size), the second no larger."""
    t = draw(st.integers(1, largest))
    return t, draw(st.integers(1, t))


@st.composite
def reductions(draw):
    """A small tensor of distinct magnitudes and a shape that is no larger in any dimension."""
    large = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    small = [draw(st.integers(1, size)) for size in large]
    count = int(torch.tensor(large).prod())
    ranks = torch.randperm(count, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    signs = torch.where(ranks % 2 == 0, 1.0, -1.0)
    return (signs * (ranks + 1)).reshape(large), tuple(small)


def picks(method, t, s, **options):
    return element_indices(method, torch.linspace(-1, 1, t), 0, s, **options).tolist()


def test_uniform_takes_every_nth_where_the_sizes_divide():
    assert uniform_indices(8, 4).tolist() == [0, 2, 4, 6]
    assert uniform_indices(6, 3).tolist() == [0, 2, 4]
    assert uniform_indices(384, 192).tolist() == list(range(0, 384, 2))
    assert uniform_indices(7, 1).tolist() == [0]


def test_uniform_rounds_a_grid_that_reaches_both_ends_where_they_do_not_divide():
    indices = uniform_indices(384, 320).tolist()
    assert indices[:9] == [0, 1, 2, 4, 5, 6, 7, 8, 10]
    assert indices == [round(Fraction(383 * i, 319)) for i in range(320)]
    assert uniform_indices(5, 3).tolist() == [0, 2, 4]


def test_consecutive_takes_the_first():
    assert picks("consecutive", 7, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("t", "s", "expected"),
    [
        (12, 6, {"first_n": [0, 1, 2, 3, 4, 5], "mid_n": [3, 4, 5, 6, 7, 8], "last_n": [6, 7, 8, 9, 10, 11]}),
        (24, 12, {"first_n": [*range(12)], "mid_n": [*range(6, 18)], "last_n": [*range(12, 24)]}),
        (9, 6, {"first_n": [0, 1, 2, 3, 4, 5], "mid_n": [1, 2, 3, 4, 5, 6], "last_n": [3, 4, 5, 6, 7, 8]}),
        (3, 2, {"first_n": [0, 1], "mid_n": [0, 1], "last_n": [1, 2]}),
        (12, 6, {"uniform": [0, 2, 4, 6, 8, 10]}),
        (24, 12, {"uniform": [*range(0, 24, 2)]}),
        (9, 6, {"uniform": [0, 2, 3, 5, 6, 8]}),
        (3, 2, {"uniform": [0, 2]}),
        (12, 6, {"quadratic": [0, 1, 2, 3, 5, 8]}),
        (24, 12, {"quadratic": [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20]}),
        (9, 6, {"quadratic": [0, 1, 2, 3, 4, 6]}),
    ],
)
def test_layers(t, s, expected):
    assert {method: layer_indices(method, t, s) for method in expected} == expected


@given(sizes())
def test_layer_rules_keep_the_order_of_the_layers(size):
    t, s = size
    for method in LAYER_SELECTION:
        layers = layer_indices(method, t, s)
        assert len(layers) == s
        assert layers == sorted(set(layers))
        assert layers[0] >= 0
        assert layers[-1] < t


@given(sizes(), st.integers(0, 2**32), st.text(max_size=5))
def test_slicing_rules_give_distinct_ascending_indices_within_range(size, seed, name):
    t, s = size
    for method in SLICING:
        indices = picks(method, t, s, seed=seed, name=name)
        assert len(indices) == s
        assert indices == sorted(set(indices))
        assert indices[0] >= 0
        assert indices[-1] < t


@given(st.integers(1, 50), st.integers(0, 9))
def test_equal_sizes_keep_everything(t, seed):
    for method in SLICING:
        assert picks(method, t, t, seed=seed) == list(range(t))
    weight = torch.linspace(1, -1, t)
    assert torch.equal(select_elements("magnitude", weight, (t,)), weight)


@given(sizes(1000))
def test_uniform_starts_at_zero_and_stays_next_to_the_even_grid(size):
    t, s = size
    indices = uniform_indices(t, s).tolist()
    step = Fraction(t, s) if t % s == 0 else Fraction(t - 1, s - 1)
    assert indices[0] == 0
    assert all(abs(index - i * step) <= Fraction(1, 2) for i, index in enumerate(indices))


@given(sizes(40), sizes(40))
def test_random_is_one_draw_per_pair_of_sizes_whatever_was_drawn_before(first, second):
    in_order = [picks("random", *size, seed=3, name="a") for size in (first, second)]
    torch.manual_seed(0)  # nor does any generator of the process matter
    reversed_order = [picks("random", *size, seed=3, name="b") for size in (second, first)]
    assert in_order == reversed_order[::-1]


def test_random_is_the_same_for_tensors_of_other_shapes_and_along_other_dimensions():
    draws = [
        element_indices("random", torch.zeros(shape), dim, 10, seed=1, name=name).tolist()
        for shape, dim, name in (((20,), 0, "norm.bias"), ((5, 20), 1, "fc.weight"), ((20, 3, 2, 2), 0, "conv.weight"))
    ]
    assert draws[0] == draws[1] == draws[2]


@pytest.mark.parametrize("method", SEEDED)
def test_another_seed_is_another_draw(method):
    draws = {tuple(picks(method, 64, 32, seed=seed)) for seed in range(20)}
    assert len(draws) == 20


def test_random_draws_reach_every_neuron():
    # A draw that, say, never took the last neuron would still be ascending, distinct and within range.
    counts = torch.zeros(8)
    for seed in range(400):
        counts[picks("random", 8, 4, seed=seed)] += 1
    assert counts.min() > 150
    assert counts.max() < 250


def test_random_inconsistent_is_a_fresh_draw_for_every_tensor_dimension_and_part():
    weight = torch.zeros(64, 64)
    names = ("blocks.0.attn.qkv.weight:0", "blocks.0.attn.qkv.weight:1", "blocks.1.attn.qkv.weight:0")
    draws = [
        tuple(element_indices("random_inconsistent", weight, dim, 32, name=name).tolist())
        for name, dim in product(names, (0, 1))
    ]
    assert len(set(draws)) == len(draws)
    again = element_indices("random_inconsistent", weight, 1, 32, name=names[-1])
    assert tuple(again.tolist()) == draws[-1]


@given(reductions())
def test_l1_keeps_the_slices_of_largest_norm(reduction):
    weight, shape = reduction
    for dim, s in enumerate(shape):
        norms = [sum(abs(x) for x in weight.select(dim, i).flatten().tolist()) for i in range(weight.shape[dim])]
        assume(len(set(norms)) == len(norms))  # which of two equal norms is kept is a choice, not the rule
        largest = sorted(range(len(norms)), key=lambda i: -norms[i])[:s]
        assert element_indices("l1", weight, dim, s).tolist() == sorted(largest)


def test_l1_sees_small_differences_between_large_half_precision_norms():
    weight = torch.ones(3, 4096, dtype=torch.float16)
    weight[2, 0] = 2  # a sum in half precision cannot tell 4097 from 4096
    assert element_indices("l1", weight, 0, 1).tolist() == [2]


@given(reductions())
def test_magnitude_keeps_the_largest_entries_in_their_order(reduction):
    weight, shape = reduction
    values = weight.flatten().tolist()
    count = int(torch.tensor(shape).prod())
    threshold = sorted(map(abs, values), reverse=True)[count - 1]
    expected = [value for value in values if abs(value) >= threshold]
    assert select_elements("magnitude", weight, shape).tolist() == torch.tensor(expected).reshape(shape).tolist()


@given(reductions(), st.sampled_from(SLICING))
def test_slicing_rules_choose_along_each_dimension_of_the_teachers_tensor(reduction, method):
    weight, shape = reduction
    chosen = select_elements(method, weight, shape, seed=5, name="x")
    kept = [element_indices(method, weight, dim, s, seed=5, name="x").tolist() for dim, s in enumerate(shape)]
    expected = torch.tensor([weight[index].item() for index in product(*kept)]).reshape(shape)
    assert torch.equal(chosen, expected)


def test_a_rule_that_does_not_exist_is_refused():
    # Silently taking one of the rules for a misspelt one would give a wrong row of a table.
    with pytest.raises(ValueError, match="unifrom"):
        element_indices("unifrom", torch.zeros(4), 0, 2)
    with pytest.raises(ValueError, match="unifrom"):
        select_elements("unifrom", torch.zeros(4), (2,))
    with pytest.raises(ValueError, match="fist_n"):
        layer_indices("fist_n", 4, 2)
