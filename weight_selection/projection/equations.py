"""The equations of projection: small matrices that turn a larger model's weights into a smaller one's.

A dense layer (linear layer or convolution) of the student does on few neurons what the teacher's does on many:

    W_student = Q W_teacher B        b_student = Q (b_teacher + W_teacher c)                                        (1)

Q is the *down map* of the neurons that the layer gives. It makes the student's neurons from the teacher's; we choose
it. B and c are the *up map* of the neurons that the layer takes. It restores the teacher's neurons from the student's;
least squares finds it. A convolution applies (1) at every place of its kernel; where the kernel meets the zeros that
pad the image's border, c is only approximately right.

This module knows no models. All matrices are float64. x are activations of the teacher, z of the student, and x~ is x
with a 1 appended.

To rotate a stream and then cut it is the idea of SliceGPT (Ashkboos et al. 2024). To choose neurons by how well the
next layer can restore the others is that of optimal brain compression and ThiNet (Luo et al. 2017).
"""

import torch
from torch import Tensor

LEAST_RIDGE = 1e-30  # of inputs that are always zero, or nearly so
RIDGE = 0.1  # of the least squares, times the mean square of the student's activations
FLAT = 1e-9  # a direction with less than this share of the largest variance holds only rounding errors


class Moments:
    """The second moments E[x~ z~'] of pairs of vectors (x, z), which come in batches.

    Attributes:
        count: number of pairs.
        products, sums: float64, on the device of the vectors: the sum of x z', (X, Z), and those of x and of z.
    """

    def __init__(self):
        self.count, self.products, self.sums = 0, 0.0, (0.0, 0.0)

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add n pairs: ``x``, (n, X), and ``z``, (n, Z), floating point."""
        self.count += len(x)
        self.products = self.products + (x.T @ z).double()
        self.sums = tuple(total + v.sum(0).double() for total, v in zip(self.sums, (x, z), strict=True))

    @property
    def mean(self) -> Tensor:
        """E[x~ z~'], (X + 1, Z + 1)."""
        x, z = self.sums
        one = x.new_full((1,), self.count)
        return torch.cat([torch.cat([self.products, x[:, None]], 1), torch.cat([z, one])[None]]) / self.count

    @property
    def covariance(self) -> Tensor:
        """E[x z'] - E[x] E[z]', (X, Z)."""
        mean = self.mean
        return mean[:-1, :-1] - torch.outer(mean[:-1, -1], mean[-1, :-1])

    @property
    def variance(self) -> Tensor:
        """The variance of each x, (X,), if z is x: the diagonal of the covariance."""
        return self.covariance.diagonal()


class Variances:
    """The variances of vectors that come in batches: of ``Moments`` with z = x only the diagonal, in little memory.

    Attributes:
        count: number of vectors.
        total: float64 (2, X), the sums of x and of its squares.
    """

    def __init__(self):
        self.count, self.total = 0, 0.0

    def add(self, x: Tensor) -> None:
        """Add n vectors ``x``, (n, X)."""
        self.count += len(x)
        self.total = self.total + torch.stack([x.double().sum(0), x.double().square().sum(0)])

    @property
    def mean(self) -> Tensor:
        """The mean of each x, (X,)."""
        return self.total[0] / self.count

    @property
    def variance(self) -> Tensor:
        """The variance of each x, (X,)."""
        mean, square = self.total / self.count
        return square - mean**2


def share(moments: Tensor) -> Tensor:
    """Moments divided by their trace, so that every layer counts alike. Moments that are all zero stay zero."""
    return moments / moments.trace().clamp(min=torch.finfo(moments.dtype).tiny)


def rotation(normalised: Tensor, frame: Tensor, centred: bool = True) -> Tensor:
    """The down map Q = E U' of a residual stream that only layer normalisations take.

    LayerNorm takes the mean away. So U, (D, k), holds the k = d - 1 leading eigenvectors of C that are orthogonal to
    the vector of ones, and E, (d, k), has orthonormal columns that are orthogonal to ones too. The student's stream
    s = E U' x then has mean zero, and its own LayerNorm only scales it.                                            (2)

    Any such E gives the same function. This one brings Q nearest to the selection S of the coordinates ``frame``: it
    makes |E U' - S| smallest. Students trained from it are a little better than from a random E (docs/results.md). It
    depends only on the space that U spans, not on the basis that eigh happens to return.

    RMS normalisations take no mean away. Then U holds the d leading eigenvectors, and E is any orthogonal matrix.

    Args:
        normalised: C = E[n n'], (D, D), of the normalised stream n.
        frame: the d coordinates of the stream that S selects, integers.
        centred: the normalisations take the mean away.

    Returns:
        Q, (d, D).
    """
    if not centred:
        basis = torch.linalg.eigh(normalised)[1][:, -len(frame) :]
        left, _, right = torch.linalg.svd(basis[frame])
        return left @ right @ basis.T
    _, directions = torch.linalg.eigh(normalised - normalised.trace() / len(normalised))  # makes ones the last
    basis = directions[:, 1 - len(frame) :]
    centring = torch.eye(len(frame), dtype=basis.dtype, device=basis.device) - 1 / len(frame)
    centred = torch.linalg.qr(centring[:, 1:]).Q
    left, _, right = torch.linalg.svd(centred.T @ basis[frame])
    return centred @ left @ right @ basis.T


def random_rotation(size: int, generator: torch.Generator, centred: bool = True) -> Tensor:
    """A random rotation, (size, size). If centred, of the vectors orthogonal to ones; it maps ones to zero."""
    first, second = (torch.randn(size, size, dtype=torch.float64, generator=generator) for _ in range(2))
    if centred:
        first[:, 0] = second[:, 0] = 1
    first, second = (torch.linalg.qr(matrix).Q[:, int(centred) :] for matrix in (first, second))
    return first @ second.T


def greedy(covariance: Tensor, weight: Tensor, count: int) -> Tensor:
    """Choose the coordinates from which least squares restores best what the next layers use of all coordinates.

    Let S be the chosen coordinates and R the covariance of x that x_S does not explain. The next layers then lose
    trace(G R). Each step chooses the coordinate j that lowers this most, by (R G R)_jj / R_jj, and removes from R
    what j explains.                                                                                                (3)

    Args:
        covariance: of x, (D, D).
        weight: G, (D, D), the sum of W'W over the layers that take x.
        count: number of coordinates to keep.

    Returns:
        Their indices, ascending, (count,).
    """
    rest = covariance.clone()
    gain = ((rest @ weight) * rest.T).sum(1)
    least = FLAT * rest.diagonal().max()
    chosen = []
    for _ in range(count):
        variance = rest.diagonal()
        gains = torch.where(variance > least, gain / variance.clamp(min=least), 0)
        gains[chosen] = -1
        best = int(gains.argmax())
        chosen.append(best)
        if rest[best, best] > least:
            explained = rest[best] / rest[best, best].sqrt()
            seen = weight @ explained
            gain = gain - 2 * explained * (rest @ seen) + explained**2 * (explained @ seen)
            rest = torch.addr(rest, explained, explained, alpha=-1)
    return torch.tensor(sorted(chosen), device=rest.device)


def strongest(variance: Tensor, outgoing: Tensor, units: Tensor, count: int) -> Tensor:
    """Choose the hidden units, or heads, with the largest variance times |outgoing weights|^2.                     (4)

    Args:
        variance: of each neuron, (D,).
        outgoing: sum of the squares of each neuron's outgoing weights, (D,).
        units: indices of each unit's neurons, integers (number of units, neurons in one): single neurons, or heads.
        count: number of units to keep.

    Returns:
        The numbers of the units, ascending, (count,).
    """
    strength = (variance * outgoing)[units].sum(1)
    return strength.argsort(descending=True, stable=True)[:count].sort().values


def shared_products(queries: Tensor, keys: Tensor, rank: int) -> tuple:
    """The down maps of a head's queries and keys that keep their products best.

    Attention sees only q'k / sqrt(a), with a dimensions in a head. Of all F_q and F_k with b rows, we take those that
    make E|q'k - (F_q q)'(F_k k)|^2 smallest for independent q and k. With R_q and R_k the roots of the moments and
    R_q R_k = U S V', these are F_q = S^1/2 U' R_q^-1 and F_k = S^1/2 V' R_k^-1 of the b leading singular values. Each
    is multiplied by (b/a)^1/4, because the student divides by sqrt(b).                                             (5)

    Args:
        queries, keys: second moments, (a, a). Softmax ignores what all keys share, so for keys give the covariance.
        rank: b. If it is a, nothing is to be gained, and both stay as they are.

    Returns:
        (F_q, F_k), each (b, a).
    """
    if rank == len(queries):
        return torch.eye(rank, dtype=queries.dtype, device=queries.device).expand(2, rank, rank)
    (q, q_inverse), (k, k_inverse) = _root(queries), _root(keys)
    left, values, right = torch.linalg.svd(q @ k)
    scale = (rank / len(queries)) ** 0.25 * values[:rank].sqrt()[:, None]
    return scale * left[:, :rank].T @ q_inverse, scale * right[:rank] @ k_inverse


def values(context: Tensor, out: Tensor, rank: int) -> Tensor:
    """The directions of a head's values, best first.

    Values reach the stream only through W_out. With R the root of the covariance of the head's output and
    W_out R = U S V', the best directions are the rows of V' R^-1 of the leading singular values. Their first rows are
    the down map; we return an orthonormal basis of them.                                                           (6)

    Args:
        context: covariance of the head's output, (a, a).
        out: W_out, (D, a).
        rank: number of directions that a head of the student takes. If it is a, the values stay as they are.

    Returns:
        (a, a). The first ``rank`` rows are the down map; a second head of the student that is made from the same head
        of the teacher takes the next rows.
    """
    if rank == len(context):
        return torch.eye(rank, dtype=context.dtype, device=context.device)
    root, inverse = _root(context)
    _, _, right = torch.linalg.svd(out @ root, full_matrices=True)
    return torch.linalg.qr((right @ inverse).T).Q.T


def solve_up_map(across: Tensor, own: Tensor, prior: Tensor, constant: bool = True) -> Tensor:
    """The up map (B, c) that restores the teacher's x from the student's z best: x ~ B z + c.

    This is ridge regression towards a given up map B~_0, the one that we would use without images:

        B~ = B~_0 + (E[x z~'] - B~_0 E[z~ z~']) (E[z~ z~'] + ridge)^-1                                              (7)

    So B~_0 stays along directions that the images do not show, and a student as large as its teacher gets exactly the
    teacher's function. The ridge is RIDGE times the mean square of z, so that the scale of z does not matter; it leaves
    c free.

    Args:
        across: E[x z~'], (D, d + 1).
        own: E[z~ z~'], (d + 1, d + 1).
        prior: B~_0, (D, d + 1).
        constant: whether the layer has a bias that can take c; if not, c is 0.

    Returns:
        B~ = (B, c), (D, d + 1); without a constant B, (D, d).
    """
    prior = prior[:, :-1]
    (across, x), (own, z) = ((moments[:, :-1], moments[:, -1:]) for moments in (across, own[:-1]))
    ridge = (RIDGE * own.diagonal().mean()).clamp(min=LEAST_RIDGE)
    if constant:  # it is free: what is left is the regression of the deviations from the means
        across, own = across - x @ z.T, own - z @ z.T
    ridges = ridge * torch.eye(len(own), dtype=own.dtype, device=own.device)
    up_map = prior + torch.linalg.solve(own + ridges, (across - prior @ own).T).T
    return torch.cat([up_map, x - up_map @ z], dim=1) if constant else up_map


def with_constant(weight: Tensor, constant: Tensor) -> Tensor:
    """The weight of a layer without a bias, behind a layer norm of gain 1 and shift 1, that adds a constant.

    The norm gives z + 1, where z has mean zero. So the direction of ones carries no signal, and W 1 = 0 by (2). A layer
    without a bias keeps its constant Q W c of (1) there:

        W' = W + constant 1'/d        W' (z + 1) = W z + constant                                                  (11)

    This is exact, for any number of layers behind one norm, each with its own constant. A shift alone, without changed
    weights, would need one vector whose product with W is the right constant in each of these layers. RMS norms have no
    shift and take no mean away, so the layers behind them have nothing to take over.

    Args:
        weight: W, (outputs, d). Its part along the vector of ones is a rounding error, and is removed.
        constant: (outputs,).

    Returns:
        W', (outputs, d).
    """
    return weight - weight.mean(1, keepdim=True) + constant[:, None] / weight.shape[1]


def _root(moments):
    """(R, R^-1) with R positive and R R = moments."""
    energies, directions = torch.linalg.eigh(moments)
    energies = energies.clamp(min=max(FLAT * energies.max().item(), torch.finfo(energies.dtype).tiny)).sqrt()
    return directions * energies @ directions.T, directions / energies @ directions.T
