"""A forward pass that stands still at each dense layer and norm until it is told to go on.

So all batches can wait at one dense layer of a student until it has its weights. Each pass runs in a thread of its
own, but only one of them runs at a time.
"""

from collections.abc import Mapping
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
        y: what it gives; None before a dense layer or a batch normalisation runs.
        behind: key of the dense layer that gave x, if the pass stands before a batch normalisation; else None.
    """

    key: str
    x: Tensor
    y: Tensor | None
    behind: str | None = None


class SteppedPass:
    """A forward pass of one batch.

    Args:
        traced: the model.
        batch: on its device.
        ahead: stand before each dense layer and batch normalisation, so that its parameters may still be changed. If
            not, stand behind it.
    """

    def __init__(self, traced: TracedModel, batch: Tensor | Mapping, ahead: bool):
        self._halts, self._go_on = SimpleQueue(), SimpleQueue()
        self._late, self._given, self._ended = None, (None, None), False
        self._thread = Thread(target=self._run, args=(traced, batch, ahead), daemon=True)
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

    def _run(self, traced, batch, ahead):
        tap = ActivationTap(
            traced,
            self._pass_on if ahead else self._stand,
            self._stand,
            batch_norm=(lambda key, x, y: y) if ahead else self._stand,
            before=self._stand if ahead else None,
        )
        try:
            if self._go_on.get():
                with torch.no_grad(), tap:
                    traced.run(batch)
                self._halts.put(None)
        except _Closed:
            pass
        except BaseException as error:  # of the model: the thread that waits for the next layer raises it
            self._halts.put(error)

    def _stand(self, key, x, y=None):
        (given, last), self._given = self._given, (None, None)
        self._halts.put(Halt(key, x, y, given if last is x else None))
        if not self._go_on.get():
            raise _Closed
        return y

    def _pass_on(self, key, x, y):
        late, self._late = self._late, None
        y = y if late is None else y + late
        self._given = key, y
        return y


class _Closed(BaseException):
    """Ends a pass."""
