"""Projection: the small matrices that turn a larger model's weights into a smaller one's, equation by equation.

A student's dense layer (linear, convolution) does what the teacher's does, on fewer neurons:

    W_student = Q W_teacher B        b_student = Q (b_teacher + W_teacher c)                                        (1)

of a convolution at every place of its kernel (at the image's border, padded with zeros, c is only nearly right). Q, the
*write* of the neurons that the layer gives, is chosen; B and c, the *read* of those that it takes, follow by
least squares. Everything here is float64 and knows nothing of models. x are a teacher's activations, z a student's,
x~ is x with a 1 appended.

Rotation and slicing is SliceGPT's idea (Ashkboos et al. 2024); choosing neurons by what the next layer can restore of
the others is that of optimal brain compression and ThiNet (Luo et al. 2017).
"""

import torch
from torch import Tensor

RIDGE = 1e-3  # of the least squares, times the mean square of what is read
FLAT = 1e-9  # directions with less than this of the largest variance carry nothing but rounding


class Moments:
    """The second moments E[x~ z~'] of two sequences of vectors that come in batches.

    Attributes:
        count: number of vectors.
        total: float64 (X + 1, Z + 1), the sum of x~ z~'; on the device of the vectors.
    """

    def __init__(self):
        self.count, self.total = 0, 0.0

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add ``x``, (n, X), and ``z``, (n, Z), floating point."""
        x, z = (torch.cat([v, v.new_ones(len(v), 1)], dim=1) for v in (x, z))
        self.count += len(x)
        self.total = self.total + (x.T @ z).double()

    @property
    def mean(self) -> Tensor:
        """E[x~ z~'], (X + 1, Z + 1)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """E[x z'] - E[x] E[z]', (X, Z)."""
        mean = self.mean
        return mean[:-1, :-1] - torch.outer(mean[:-1, -1], mean[-1, :-1])

    @property
    def variance(self) -> Tensor:
        """The diagonal of the covariance, (X,), where z is x."""
        return self.covariance.diagonal()


class Variances:
    """As ``Moments`` of a sequence with itself, but of the diagonal only.

    Attributes:
        count: number of vectors.
        total: float64 (2, X), the sums of x and of its squares.
    """

    def __init__(self):
        self.count, self.total = 0, 0.0

    def add(self, x: Tensor) -> None:
        """Add ``x``, (n, X)."""
        self.count += len(x)
        self.total = self.total + torch.stack([x.double().sum(0), x.double().square().sum(0)])

    @property
    def variance(self) -> Tensor:
        """(X,)."""
        mean, square = self.total / self.count
        return square - mean**2


def share(moments: Tensor) -> Tensor:
    """Moments divided by their trace, so that every layer counts alike; of a layer that is all zero, zeros."""
    return moments / moments.trace().clamp(min=torch.finfo(moments.dtype).tiny)


def rotation(normalised: Tensor, frame: Tensor) -> Tensor:
    """Q = E U' of a residual stream that only normalisations read.

    LayerNorm takes the mean away: U are the k = d - 1 leading eigenvectors of C that are orthogonal to the vector of
    ones, E, d x k, has orthonormal columns orthogonal to ones, so the student's stream s = E U' x has mean zero and its
    own LayerNorm only scales it.                                                                                   (2)

    Any E gives the same function. This one, nearest to keeping coordinates, |E U' - S| least, trains a little better
    than a random one (RESULTS.md), and depends on the space that U spans and not on its basis.

    Args:
        normalised: C = E[n n'], (D, D).
        frame: the d coordinates S of the stream that E comes near to, integers.

    Returns:
        (d, D).
    """
    _, directions = torch.linalg.eigh(normalised - normalised.trace() / len(normalised))  # of ones the least
    basis = directions[:, 1 - len(frame) :]
    centring = torch.eye(len(frame), dtype=basis.dtype, device=basis.device) - 1 / len(frame)
    centred = torch.linalg.qr(centring[:, 1:]).Q
    left, _, right = torch.linalg.svd(centred.T @ basis[frame])
    return centred @ left @ right @ basis.T


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random rotation of a stream without its mean, (size, size): from what is orthogonal to ones onto the same."""
    first, second = (torch.randn(size, size, dtype=torch.float64, generator=generator) for _ in range(2))
    first[:, 0] = second[:, 0] = 1
    return torch.linalg.qr(first).Q[:, 1:] @ torch.linalg.qr(second).Q[:, 1:].T


def greedy(covariance: Tensor, weight: Tensor, count: int) -> Tensor:
    """Coordinates from which least squares restores the most of what is read of all of them.

    With S chosen, what readers lose is trace(G R), R the covariance of x that x_S does not explain. The next one is
    that which lessens it most, by (R G R)_jj / R_jj, and R loses what it explains.                                 (3)

    Args:
        covariance: of x, (D, D).
        weight: G = sum of W'W over the readers of x, (D, D).
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


def strongest(variance: Tensor, outgoing: Tensor, groups: Tensor, count: int) -> Tensor:
    """Groups of hidden units of the largest variance times |outgoing weights|^2, ascending.                        (4)

    Args:
        variance: of each unit, (D,).
        outgoing: sum of the squares of the weights that read it, (D,).
        groups: integers (number of groups, size of a group): single units, or heads.
        count: number of groups to keep.
    """
    strength = (variance * outgoing)[groups].sum(1)
    return strength.argsort(descending=True, stable=True)[:count].sort().values


def shared_products(queries: Tensor, keys: Tensor, rank: int) -> tuple:
    """Q of queries and of keys: the best ``rank`` of a head's dimensions for their product.

    Attention sees q'k / sqrt(a) only. Of all F_q, F_k of that rank, these make E|q'k - (F_q q)'(F_k k)|^2 least for
    independent q and k: with roots of the moments R_q, R_k and R_q R_k = U S V', F_q = S^1/2 U' R_q^-1 of the leading
    singular values, F_k likewise, and (b/a)^1/4 each for the student's own 1 / sqrt(b).                            (5)

    Args:
        queries, keys: second moments (a, a); of keys, the covariance, since softmax ignores what all keys share.
        rank: b; of all a there is nothing to gain, and they stay as they are.

    Returns:
        (F_q, F_k), each (rank, a).
    """
    if rank == len(queries):
        return torch.eye(rank, dtype=queries.dtype, device=queries.device).expand(2, rank, rank)
    (q, q_inverse), (k, k_inverse) = _root(queries), _root(keys)
    left, values, right = torch.linalg.svd(q @ k)
    scale = (rank / len(queries)) ** 0.25 * values[:rank].sqrt()[:, None]
    return scale * left[:, :rank].T @ q_inverse, scale * right[:rank] @ k_inverse


def values(context: Tensor, out: Tensor, rank: int) -> Tensor:
    """Q of a head's values, the best directions first.

    Values reach the stream through W_out only: with R the root of the covariance of what the head hands on and W_out R
    = U S V', the best are V' R^-1 of the leading singular values; here an orthonormal basis of them.               (6)

    Args:
        context: covariance (a, a) of the head's output.
        out: W_out, (D, a).
        rank: number of directions that a student's head takes; if all a, they stay as they are.

    Returns:
        (a, a), of which the first ``rank`` rows are Q; the next belong to another head that is made from the same.
    """
    if rank == len(context):
        return torch.eye(rank, dtype=context.dtype, device=context.device)
    root, inverse = _root(context)
    _, _, right = torch.linalg.svd(out @ root, full_matrices=True)
    return torch.linalg.qr((right @ inverse).T).Q.T


def read_through(across: Tensor, own: Tensor, prior: Tensor, constant: bool = True) -> Tensor:
    """The read (B, c) that gives the teacher's x from the student's z: x ~ B z + c.

    Ridge regression towards the read that one would take without images, so that directions that they do not show stay
    there, and a student as large as its teacher reads exactly as that does:

        B~ = B~_0 + (E[x z~'] - B~_0 E[z~ z~']) (E[z~ z~'] + ridge)^-1                                              (7)

    The ridge is RIDGE times the mean square of z, so that scaling z changes nothing, and leaves c free.

    Args:
        across: E[x z~'], (D, d + 1).
        own: E[z~ z~'], (d + 1, d + 1).
        prior: B~_0, (D, d + 1).
        constant: whether there is a c; if not, c = 0.

    Returns:
        (D, d + 1), or (D, d) without a c.
    """
    if not constant:
        across, own, prior = across[:, :-1], own[:-1, :-1], prior[:, :-1]
    missing = across - prior @ own
    if not missing.any():
        return prior
    squares = own.diagonal().clone()
    squares[:] = (RIDGE * squares[: prior.shape[1] - constant].mean()).clamp(min=torch.finfo(own.dtype).tiny)
    if constant:
        squares[-1] = 0
    return prior + torch.linalg.solve(own + squares.diag(), missing.T).T


def _root(moments):
    """(R, R^-1) of R R = moments, positive."""
    energies, directions = torch.linalg.eigh(moments)
    energies = energies.clamp(min=max(FLAT * energies.max().item(), torch.finfo(energies.dtype).tiny)).sqrt()
    return directions * energies @ directions.T, directions / energies @ directions.T
