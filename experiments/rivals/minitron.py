"""Minitron (2407.14679, section 2.2): width pruning by the size of activations.

Importance is the mean over tokens, then the L2 norm over images, which the paper found best: of the outputs of the
layer norms, added up over all of them, for the stream; of the hidden units; of attention's outputs. The paper prunes
whole heads. Here the student keeps their number, and dimensions of a head are ranked in the same way: those of values
by the head's output, those of queries and keys by the product of both sizes.
"""

from rivals.arms import Pair
from rivals.vit_widths import Kept, cut, magnitudes, strongest


def prune(pair: Pair) -> dict:
    """The weights of the neurons with the largest activations."""
    norms = {kind: values.norm(dim=0) for kind, values in magnitudes(pair.teacher, pair.images).items()}
    block = pair.student.blocks[0]
    stream = strongest(norms["norms"].sum(0), pair.student.embed_dim)
    units = [strongest(layer, block.mlp.fc1.out_features) for layer in norms["units"]]
    keys, values = ([strongest(layer, block.attn.head_dim) for layer in norms[kind]] for kind in ("keys", "values"))
    return cut(pair, Kept(stream, units, keys, values))
