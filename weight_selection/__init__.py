"""Weight selection: first weights for a small model, from a larger pretrained one.

"Initializing Models with Larger Ones" (ICLR 2024), section 3. Three steps: select layers, match components, select
elements. A plan is made first, from shapes alone; applying it touches the weights.

    from weight_selection import select_weights
    student.load_state_dict(select_weights(teacher, student), strict=False)

Importing this package imports no torch; ``select_weights`` does when it is first used.
"""

from typing import TYPE_CHECKING

from weight_selection.errors import InputError
from weight_selection.options import ELEMENT_SELECTION, LAYER_SELECTION, PROJECTION

if TYPE_CHECKING:
    from weight_selection.selection import select_weights

__all__ = ["ELEMENT_SELECTION", "LAYER_SELECTION", "PROJECTION", "InputError", "select_weights"]


def __getattr__(name):
    if name == "select_weights":
        from weight_selection.selection import select_weights

        return select_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
