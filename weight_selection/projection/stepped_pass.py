"""A forward pass that stands still at each dense layer and norm until it is told to go on.

So all batches can wait before one dense layer of a student until it has its weights. Each pass runs in a thread of its
own, but only one of them runs at a time.
"""

import weakref
from collections import defaultdict
from collections.abc import Collection, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from weight_selection.projection.activation_tap import ActivationTap
from weight_selection.projection.traced_model import TracedModel


class Halt(NamedTuple):
    """A dense layer or norm at which a pass stands.

    Attributes:
        key: of the weight of a dense layer, or of the gain of a norm.
        x: what it takes.
        behind: key of the dense layer or batch normalisation that gave x; None if none did.
    """

    key: str
    x: Tensor
    behind: str | None = None


class SteppedPass:
    """A forward pass of one batch. It stands before a dense layer or a batch normalisation, and behind another norm.

    Args:
        traced: the model. Parameters of the layer before which the pass stands may be changed.
        batch: on its device.
        outputs: keys of dense layers and batch normalisations, of which we keep what they give.

    Attributes:
        given: {key of ``outputs``: [copy of what it gave]}, one for each time that it ran.
    """

    def __init__(self, traced: TracedModel, batch: Tensor | Mapping, outputs: Collection = ()):
        self.given = defaultdict(list)
        self._outputs, self._halts, self._go_on = outputs, SimpleQueue(), SimpleQueue()
        self._late, self._last, self._ended = None, (None, lambda: None), False
        self._thread = Thread(target=self._run, args=(traced, batch), daemon=True)
        self._thread.start()

    def next(self) -> Halt | None:
        """Go on to the next halt; None at the end, and from then on. What the model raises is raised here."""
        if self._ended:
            return None
        self._go_on.put(True)
        halt = self._halts.get()
        self._ended = not isinstance(halt, Halt)
        if isinstance(halt, BaseException):
            raise halt
        return halt

    def add_late(self, bias: Tensor) -> None:
        """Add a change of biases to what the next dense layer gives: its module has read the old ones already."""
        self._late = bias

    def close(self) -> None:
        """End the pass where it stands."""
        self._go_on.put(False)
        self._thread.join()

    def _run(self, traced, batch):
        tap = ActivationTap(traced, self._pass_on, self._norm, batch_norm=self._pass_on, before=self._stand)
        try:
            if self._go_on.get():
                with torch.no_grad(), tap:
                    traced.run(batch)
                self._halts.put(None)
        except _Closed:
            pass
        except BaseException as error:  # of the model: the thread that waits for the next layer raises it
            self._halts.put(error)

    def _stand(self, key, x):
        last, y = self._last
        self._halts.put(Halt(key, x, last if y() is x else None))
        if not self._go_on.get():
            raise _Closed

    def _norm(self, key, x, y):
        self._stand(key, x)
        return y

    def _pass_on(self, key, x, y):
        late, self._late = self._late, None
        y = y if late is None else y + late
        if key in self._outputs:
            self.given[key].append(y.clone())  # the model may change it in place
        self._last = key, weakref.ref(y)
        return y


class _Closed(BaseException):
    """Ends a pass."""
