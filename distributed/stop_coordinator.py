"""What all processes of a run must know at the same step: that it is to stop, and why."""

import datetime
import signal

import torch
import torch.distributed as dist

from distributed.program import RunError, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FAULT = 255  # more than any signal's number, so that the largest word of all processes is the one that counts


class StopCoordinator:
    """Signals and faults that one process sees, made known to all of them at the same step.

    A process that is told to stop, or finds that the run cannot go on, may not simply leave: the others would wait for
    it. It goes on computing, and says so at its next ``poll``; every process learns of it at the poll after that, from
    an exchange that went on beside the step in between. The exchange is between the hosts, also for a run on GPUs: a
    process that no longer answers is found out there, before NCCL aborts.

    Use as a context: signals are answered within it. Until ``patient`` is set they raise ``Stopped`` at once, and a
    second Ctrl-C always does.

    Args:
        timeout: seconds to wait for another process.
    """

    def __init__(self, timeout: float):
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self.patient = False
        self.word = 0  # this process's: 0, a signal's number, or FAULT
        self.reason = None
        self.interrupts = 0  # by Ctrl-C
        self.largest = torch.zeros(1, dtype=torch.int64)
        self.exchange = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.interrupts += number == signal.SIGINT
        if not self.patient or self.interrupts > 1:
            raise Stopped(number, agreed=False)
        self.word = max(self.word, number)

    def fail(self, reason: str) -> None:
        """Make the polls to come raise a RunError with this reason, in all processes."""
        self.reason = self.reason or reason
        self.word = FAULT

    def poll(self) -> int:
        """The number of the signal that some process had got by the poll before, or 0. All processes get the same.

        Raises:
            RunError: some process had called ``fail``.
        """
        if self.group is None:
            return self._judge(self.word)
        largest = self._finish()
        self._start()
        return self._judge(largest)

    def settle(self) -> None:
        """Raise what ``poll`` would, of all that has happened up to now. It waits for all processes."""
        if self.group is None:
            self._judge(self.word)
            return
        self._finish()
        self._start()
        self._judge(self._finish())

    def _start(self):
        self.largest.fill_(self.word)
        self.exchange = dist.all_reduce(self.largest, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def _finish(self):
        if self.exchange is None:
            return 0
        self.exchange.wait()
        self.exchange = None
        return self.largest.item()

    def _judge(self, largest):
        if largest < FAULT:
            return largest
        raise RunError(next(reason for reason in self.gather_objects(self.reason) if reason is not None))

    def gather(self, values: torch.Tensor) -> list:
        """The tensors (on the CPU, of one shape) of all processes, in their order."""
        if self.group is None:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, values, group=self.group)
        return gathered

    def gather_objects(self, value) -> list:
        """The plain values of all processes, in their order."""
        if self.group is None:
            return [value]
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered
