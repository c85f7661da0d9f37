"""How processes that train together stop at the same step: at a signal, or because one of them cannot go on."""

import datetime
import signal
from typing import Any

import torch
import torch.distributed as dist

from distributed.program import RunError, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FAULT = 255  # larger than any signal's number: the largest stop code of all processes counts


class StopCoordinator:
    """Makes signals and faults that one process sees known to all processes at the same step.

    A process that receives a signal, or finds that the run cannot go on, may not simply leave: the others would wait
    for it. It goes on computing and shares its stop code at its next ``poll``. All processes learn the code one poll
    later: the exchange runs beside the step in between. The hosts exchange the codes (gloo), also when GPUs train. So
    a process that no longer answers is noticed here, before NCCL aborts.

    The object is a context, and handles signals within it. A signal raises ``Stopped`` at once until ``defer_signals``
    is set, and then at a poll; a second Ctrl-C always raises it at once. It waits ``timeout`` seconds for a process.
    """

    def __init__(self, timeout: float):
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self.defer_signals = False
        self.stop_code = 0  # this process's: 0, a signal's number, or FAULT
        self.reason = None
        self.interrupts = 0  # by Ctrl-C
        self.largest_code = torch.zeros(1, dtype=torch.int64)
        self.exchange = None

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.interrupts += number == signal.SIGINT
        self.stop_code = max(self.stop_code, number)  # Python ignores what is raised in a __del__; the poll then stops
        if not self.defer_signals or self.interrupts > 1:
            raise Stopped(number, agreed=False)

    def fail(self, reason: str) -> None:
        """Let the next polls of all processes raise a RunError with this reason."""
        self.reason = self.reason or reason
        self.stop_code = FAULT

    def poll(self) -> None:
        """Stop, in all processes, if one of them had a reason for it by the poll before.

        Raises:
            Stopped: a process had received a signal.
            RunError: a process had called ``fail``.
        """
        code = self.stop_code
        if self.group is not None:
            code = self._finish_exchange()
            self._start_exchange()
        self._raise_fault(code)
        if code:
            raise Stopped(code, agreed=True)

    def settle(self) -> None:
        """Wait for all processes, and raise a RunError if one of them has called ``fail`` by now."""
        code = self.stop_code
        if self.group is not None:
            self._finish_exchange()
            self._start_exchange()
            code = self._finish_exchange()
        self._raise_fault(code)

    def _start_exchange(self):
        self.largest_code.fill_(self.stop_code)
        self.exchange = dist.all_reduce(self.largest_code, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def _finish_exchange(self):
        if self.exchange is None:
            return 0
        self.exchange.wait()
        self.exchange = None
        return self.largest_code.item()

    def _raise_fault(self, code):
        if code >= FAULT:
            raise RunError(self.first_of_all(self.reason))

    def first_of_all(self, value: Any) -> Any:
        """The value of the first process whose value is not None; None if there is no such process."""
        return next((other for other in self.gather_objects(value) if other is not None), None)

    def gather_objects(self, value: Any) -> list:
        """The values of all processes, plain ones or tensors on the CPU, in the order of their ranks."""
        if self.group is None:
            return [value]
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered
