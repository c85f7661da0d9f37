"""Weight subcloning (2312.09299): neurons ranked by their mean absolute activation, and weights scaled up.

All layers keep the same neurons of the stream, those whose activations, added up over all layers that write to it, are
largest. Hidden units are ranked in each layer. The student has as many heads, of half the size, which the paper does
not treat: dimensions of a head are ranked in the same way. Each matrix is multiplied by the root of (the teacher's
inputs / the student's), so that its outputs keep their deviation.
"""

from rivals.arms import Pair
from rivals.vit_widths import Kept, cut, magnitudes, strongest


def subclone(pair: Pair) -> dict:
    """The weights of the neurons with the largest mean absolute activations, scaled."""
    means = {kind: values.mean(0) for kind, values in magnitudes(pair.teacher, pair.images).items()}
    block = pair.student.blocks[0]
    stream = strongest(means["writes"].sum(0), pair.student.embed_dim)
    units = [strongest(layer, block.mlp.fc1.out_features) for layer in means["units"]]
    keys, values = ([strongest(layer, block.attn.head_dim) for layer in means[kind]] for kind in ("keys", "values"))
    return cut(pair, Kept(stream, units, keys, values), scaled=True)
