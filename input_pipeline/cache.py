"""Images of a data set, decoded once and kept in memory."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from utils import Progress
from weight_selection.errors import InputError
from weight_selection.image_files import BadImage

SAMPLE = 64  # images that tell how much memory all will take


class CachedDataset:
    """A data set whose items, (image, label), are those of another, with all images in one buffer.

    Loader workers share the buffer, as they are forked from the process that has it; processes of a run do not.

    Args:
        dataset: gives (uint8 (height, width, 3), label).
        name: of the images, for messages.

    Attributes:
        data: flat uint8, the images one after the other.
    """

    def __init__(self, dataset, name: str):
        self.bad, self.labels, self.shapes, parts = {}, [], [], []

        def read(index):
            try:
                return dataset[index]
            except BadImage as error:
                self.bad[index] = str(error)
                return torch.empty(0, 1, 3, dtype=torch.uint8), 0

        with ThreadPoolExecutor(os.cpu_count()) as threads, Progress(f"reading {name}", len(dataset), 1) as progress:
            for start in range(0, len(dataset), SAMPLE):
                for image, label in threads.map(read, range(start, min(start + SAMPLE, len(dataset)))):
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


def check_memory(datasets, device: torch.device | None) -> None:
    """Estimate from a few images how much memory ``CachedDataset`` takes: on this machine, and on a device if any.

    Raises:
        InputError: more than there is.
    """
    size = sum(_estimate(dataset) for dataset in datasets)
    if device is not None and device.type == "cuda":
        _compare(size, torch.cuda.mem_get_info(device)[0], "GPU")
    # While a store is filled, images are in memory twice; and each process has its own.
    _compare(2 * size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), _free_memory(), "machine")


def _estimate(dataset):
    sizes = []
    for index in range(0, len(dataset), max(1, len(dataset) // SAMPLE)):
        with contextlib.suppress(BadImage):
            sizes.append(dataset[index][0].numel())
    return len(dataset) * sum(sizes) / max(1, len(sizes))


def _compare(needed, free, where):
    if needed > 0.9 * free:
        raise InputError(
            f"--cache_images true: needs about {needed / 1e9:.1f} GB, this {where} has {free / 1e9:.1f} GB free; "
            "leave it out"
        )


def _free_memory():
    """Bytes that this machine, or the container or job that the process is in, can still give to it."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
