"""The equations of projection, against plain loops and searches."""

import pytest
import torch

from helpers import random
from weight_selection.projection import equations

DOUBLE = torch.float64


def test_moments_of_batches_are_those_of_a_plain_loop():
    x, z = random(50, 4) + 1, random(50, 3, seed=1) - 2
    moments, variances = equations.Moments(), equations.Variances()
    for part, other in zip(x.split(7), z.split(7), strict=True):
        moments.add(part, other)
        variances.add(part)
    loop = (
        sum(
            torch.outer(torch.cat([a, a.new_ones(1)]), torch.cat([b, b.new_ones(1)])) for a, b in zip(x, z, strict=True)
        )
        / 50
    )
    torch.testing.assert_close(moments.mean, loop)
    torch.testing.assert_close(moments.covariance, (x - x.mean(0)).T @ (z - z.mean(0)) / 50)
    torch.testing.assert_close(variances.variance, x.var(0, correction=0))


def test_a_rotation_has_orthonormal_rows_that_are_orthogonal_to_ones_but_for_their_mean():
    n = random(200, 12)
    n = n - n.mean(1, keepdim=True)
    frame = torch.arange(0, 12, 2)
    write = equations.rotation(n.T @ n, frame)
    torch.testing.assert_close(write @ write.T, torch.eye(6, dtype=DOUBLE) - 1 / 6)  # a projection off ones
    torch.testing.assert_close(write.sum(0), torch.zeros(12, dtype=DOUBLE))
    energies = torch.linalg.eigvalsh(n.T @ n)
    torch.testing.assert_close(((write @ n.T) ** 2).sum(), energies[-5:].sum())  # the leading ones


def test_a_rotation_is_the_nearest_to_its_coordinates():
    n = random(200, 12)
    n = n - n.mean(1, keepdim=True)
    frame = torch.tensor([1, 2, 5, 6, 8, 11])
    write = equations.rotation(n.T @ n, frame)
    select = torch.eye(12, dtype=DOUBLE)[frame]
    best = (write - select).norm()
    for seed in range(20):
        turn = random(6, 6, seed=seed)
        turn[:, 0] = 1
        turn = torch.linalg.qr(turn).Q[:, 1:]
        other = random(6, 6, seed=seed + 100)
        other[:, 0] = 1
        turned = turn @ torch.linalg.qr(other).Q[:, 1:].T @ write
        assert (turned - select).norm() > best


def test_a_rotation_of_a_stream_that_uses_few_directions_keeps_off_ones_too():
    n = random(200, 3) @ random(3, 12)
    n = n - n.mean(1, keepdim=True)
    write = equations.rotation(n.T @ n, torch.arange(8))
    torch.testing.assert_close(write @ write.T, torch.eye(8, dtype=DOUBLE) - 1 / 8)
    torch.testing.assert_close(write.sum(0), torch.zeros(12, dtype=DOUBLE))
    torch.testing.assert_close(((write @ n.T) ** 2).sum(), (n**2).sum())


def test_greedy_coordinates_explain_their_copies_and_what_is_taken():
    base = random(100, 4) * torch.tensor([1.0, 2, 3, 4], dtype=DOUBLE)
    x = base[:, [0, 0, 1, 1, 2, 2, 3, 3]]
    covariance = torch.cov(x.T)
    kept = equations.greedy(covariance, torch.eye(8, dtype=DOUBLE), 4)
    assert (kept // 2).tolist() == [0, 1, 2, 3]  # one of each pair
    taker = torch.zeros(8, dtype=DOUBLE)
    taker[1] = 1
    assert equations.greedy(covariance, torch.diag(taker), 1).item() in (0, 1)  # the only pair that is taken


def test_each_greedy_choice_is_the_best_one():
    x = random(60, 7)
    covariance, read = torch.cov(x.T), random(3, 7, seed=2)
    weight = read.T @ read

    def lost(kept):
        inside = covariance[kept][:, kept]
        rest = covariance - covariance[:, kept] @ torch.linalg.inv(inside) @ covariance[kept]
        return (weight * rest).sum()

    kept = []
    for _ in range(3):
        kept.append(min(set(range(7)) - set(kept), key=lambda index: lost([*kept, index])))
    assert equations.greedy(covariance, weight, 3).tolist() == sorted(kept)


def test_shared_products_are_the_best_of_their_rank():
    q, k = random(300, 6) @ random(6, 6, seed=3), random(300, 6, seed=1) @ random(6, 6, seed=4)
    queries, keys = q.T @ q / 300, k.T @ k / 300

    def error(to_q, to_k):
        middle = torch.eye(6, dtype=DOUBLE) - to_q.T @ to_k * (6 / len(to_q)) ** 0.5
        return (queries @ middle @ keys @ middle.T).trace()

    best = error(*equations.shared_products(queries, keys, 2))
    for seed in range(20):
        some = torch.linalg.qr(random(6, 2, seed=seed)).Q.T * (2 / 6) ** 0.25
        assert error(some, some) > best
    exact = equations.shared_products(queries, keys, 6)
    assert error(*exact) < 1e-12 and torch.equal(exact[0], torch.eye(6, dtype=DOUBLE))


def test_layers_without_a_bias_keep_constants_that_no_shift_of_the_norm_before_them_could_give_them():
    z = random(40, 6)
    z = z - z.mean(1, keepdim=True)
    weights = [random(5, 6, seed=seed) for seed in (1, 2, 3)]
    weights = [weight - weight.mean(1, keepdim=True) for weight in weights]
    constants = [random(5, seed=seed) for seed in (4, 5, 6)]
    for weight, constant in zip(weights, constants, strict=True):
        made = equations.with_constant(weight + 1e-9, constant)
        torch.testing.assert_close((z + 1) @ made.T, z @ weight.T + constant)
    stacked, wanted = torch.cat(weights), torch.cat(constants)
    shift = torch.linalg.lstsq(stacked, wanted[:, None], driver="gelsd").solution
    assert (stacked @ shift - wanted[:, None]).norm() > 0.1 * wanted.norm()


def test_a_rotation_for_rms_norms_keeps_the_leading_directions_next_to_its_coordinates():
    n, frame = random(200, 12), torch.arange(0, 12, 2)
    write = equations.rotation(n.T @ n, frame, centred=False)
    torch.testing.assert_close(write @ write.T, torch.eye(6, dtype=DOUBLE))
    torch.testing.assert_close(((write @ n.T) ** 2).sum(), torch.linalg.eigvalsh(n.T @ n)[-6:].sum())
    select = torch.eye(12, dtype=DOUBLE)[frame]
    turned = (torch.linalg.qr(random(6, 6, seed=seed)).Q @ write for seed in range(20))
    assert all((other - select).norm() > (write - select).norm() for other in turned)


def test_a_read_is_least_squares_and_stays_at_its_prior_where_nothing_is_seen(monkeypatch):
    monkeypatch.setattr(equations, "RIDGE", 1e-12)
    z = random(100, 4)
    z[:, 3] = 0  # never seen
    x = z @ random(4, 6, seed=1) + 3
    moments, own = equations.Moments(), equations.Moments()
    moments.add(x, z)
    own.add(z, z)
    prior = random(6, 5, seed=2)
    read = equations.solve_up_map(moments.mean[:-1], own.mean, prior)
    torch.testing.assert_close(z @ read[:, :-1].T + read[:, -1], x)
    torch.testing.assert_close(read[:, 3], prior[:, 3])


@pytest.mark.parametrize("size", [0.0, 1e-35])
def test_inputs_that_are_nearly_zero_leave_the_up_map_as_it_was(size):
    own, across = (size**2 * torch.ones(n, 4, dtype=torch.float64) for n in (4, 3))
    own[-1, -1], prior = 1.0, torch.randn(3, 4, dtype=torch.float64)
    found = equations.solve_up_map(across, own, prior)
    torch.testing.assert_close(found[:, :3], prior[:, :3])
