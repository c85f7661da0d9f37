"""A data set whose images are decoded once and kept in memory."""

import contextlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset

from distributed.stop_coordinator import StopCoordinator
from utils import Progress
from weight_selection.errors import InputError
from weight_selection.image_files import BadImage

SAMPLE = 64  # this many images are read to estimate the memory for all


class CachedDataset:
    """A data set with the items of another one, (uint8 (height, width, 3), label), and all images in one buffer.

    An item that raises ``BadImage`` goes on doing so. A process's loader workers share the buffer, because they are
    forked from it. Each process of a run has its own. ``name`` is what to call the images while they are read.

    Attributes:
        data: flat uint8, the images one after the other.
    """

    def __init__(self, dataset: Dataset, name: str):
        self.bad, self.labels, self.shapes, parts = {}, [], [], []
        with ThreadPoolExecutor(os.cpu_count()) as threads, Progress(f"reading {name}", len(dataset), 1) as progress:
            for start in range(0, len(dataset), SAMPLE):  # in small groups, so that few images wait their turn
                indices = range(start, min(start + SAMPLE, len(dataset)))
                for index, (image, label) in zip(indices, threads.map(partial(_read, dataset), indices), strict=True):
                    if isinstance(image, BadImage):
                        self.bad[index], image = str(image), torch.empty(0, 1, 3, dtype=torch.uint8)
                    parts.append(image.reshape(-1))
                    self.shapes.append(tuple(image.shape))
                    self.labels.append(label)
                    progress.step(str)
        lengths = torch.tensor([len(part) for part in parts])
        self.offsets = (lengths.cumsum(0) - lengths).tolist()
        self.data = torch.empty(int(lengths.sum()), dtype=torch.uint8)
        for index, offset in enumerate(self.offsets):
            self.data[offset : offset + len(parts[index])] = parts[index]
            parts[index] = None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImage(self.bad[index])
        height, width, _ = self.shapes[index]
        offset = self.offsets[index]
        return self.data[offset : offset + 3 * height * width].view(height, width, 3), self.labels[index]


def _read(dataset, index):
    try:
        return dataset[index]
    except BadImage as error:
        return error, 0


def check_memory(datasets: Iterable[Dataset], device: torch.device | None, stop_coordinator: StopCoordinator) -> None:
    """Estimate from a few images whether all fit into the memory of this machine, and of a device if one is given.

    Raises:
        InputError: in any process they need more memory than is free; all must call it, and all raise it.
    """
    size = sum(_estimate(dataset) for dataset in datasets)
    # Every process has its own images, and has them twice while it fills its buffer.
    refusal = _refusal(2 * size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), _free_memory(), "machine")
    if device is not None and device.type == "cuda":
        refusal = _refusal(size, torch.cuda.mem_get_info(device)[0], "GPU") or refusal
    if refusal := stop_coordinator.first_of_all(refusal):
        raise InputError(refusal)


def _refusal(needed, free, where):
    if needed <= 0.9 * free:
        return None
    has = f"needs about {needed / 1e9:.1f} GB, this {where} has {free / 1e9:.1f} GB free"
    return f"--cache_images true: {has}; leave it out"


def _estimate(dataset):
    sizes = []
    for index in range(0, len(dataset), max(1, len(dataset) // SAMPLE)):
        with contextlib.suppress(BadImage):
            sizes.append(dataset[index][0].numel())  # bytes
    return len(dataset) * sum(sizes) / max(1, len(sizes))


def _free_memory():
    """The bytes that this machine can still give to the process, or the container or job that it runs in."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
