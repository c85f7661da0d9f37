"""Seeds, printing and the progress bar. Nothing here knows about models or data."""

import datetime
import math
import random
import sys
import time
from collections.abc import Callable

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from tqdm import tqdm


def is_main() -> bool:
    """Whether this is the one process that prints and writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def seed_host(*numbers: int) -> int:
    """Seed Python, numpy and torch on the CPU from non-negative integers; returns torch's seed.

    Loader workers call this for every image: ``torch.manual_seed`` looks for accelerators each time, which takes longer
    than all the rest.
    """
    words = [int(word) for word in np.random.SeedSequence(numbers).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    return words[2]


def seed_everything(*numbers: int) -> None:
    """Seed Python, numpy and torch on all devices from non-negative integers.

    Training seeds with (seed, epoch, image) before it augments an image, and with (seed, epoch, micro-batch, 1) before
    it computes on a micro-batch. So the random numbers do not depend on workers, processes or interruptions.
    """
    torch.manual_seed(seed_host(*numbers))


def versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""
    packages = {package.__name__: package.__version__ for package in (torch, torchvision, timm, np)}
    return {"python": sys.version.split()[0], **packages}


def print_main(*words) -> None:
    """Print in the main process only."""
    if is_main():
        tqdm.write(" ".join(str(word) for word in words))
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


class Progress:
    """Shows how many of ``total`` steps are done and the time left: as a bar on a terminal, and otherwise in lines.

    About ``lines`` of them are printed in all. ``header`` begins the bar or each line. ``done`` steps were done before.
    """

    def __init__(self, header: str, total: int, lines: int = 5, done: int = 0):
        self.header, self.total = header, total
        self.every = max(1, total // lines) if lines else math.inf
        self.first, self.done, self.start = done, done, time.monotonic()
        self.bar = None
        if is_main() and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=header, leave=False, dynamic_ncols=True)

    def step(self, describe: Callable[[], str]) -> None:
        """Count one step. ``describe`` returns the text to show; it is called only when something is shown."""
        self.done += 1
        shown = self.done % self.every == 0 or (self.done == self.total and self.every <= self.total)
        if self.bar is not None:
            if shown or self.done % 10 == 0:
                self.bar.set_postfix_str(describe(), refresh=False)
            self.bar.update()
        elif shown and is_main():
            left = (time.monotonic() - self.start) / (self.done - self.first) * (self.total - self.done)
            done = f"{self.done:>{len(str(self.total))}}/{self.total}"
            print_main(f"{self.header} [{done}] {describe()} eta {duration(left)}")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()


def describe(values: dict) -> str:
    """Write names and values in one line."""
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
