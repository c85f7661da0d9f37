"""Images of a data set, decoded once and kept in memory."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from program import InputError
from sources import BadImage
from utils import Progress

SAMPLE = 64  # images that tell how much memory all will take


class Store:
    """A data set whose items, (image, label), are those of another, with all images in one buffer.

    Loader workers share the buffer, as they are forked from the process that has it; processes of a run do not.

    Args:
        dataset: gives (uint8 (height, width, 3), label).
        name: of the images, for messages.

    Attributes:
        data: flat uint8, the images one after the other.

    Raises:
        InputError: they take more memory than there is.
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
                if start == 0:
                    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
                    self._check(sum(map(len, parts)) / len(parts) * len(dataset) * processes, _free_memory(), name)
        lengths = torch.tensor([len(part) for part in parts])
        self.offsets = (lengths.cumsum(0) - lengths).tolist()
        self.data = torch.empty(int(lengths.sum()), dtype=torch.uint8)
        for index, offset in enumerate(self.offsets):
            part, parts[index] = parts[index], None  # freed as the buffer fills
            self.data[offset : offset + len(part)] = part

    @staticmethod
    def _check(needed, free, name):
        if needed > 0.9 * free:
            raise InputError(
                f"--cache_images true: {name} take about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; leave it out"
            )

    def on(self, device: torch.device) -> torch.Tensor:
        """The buffer on a device.

        Raises:
            InputError: too little memory there.
        """
        if device.type == "cuda":
            self._check(len(self.data), torch.cuda.mem_get_info(device)[0], f"{len(self):,} images on the GPU")
        return self.data.to(device)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImage(self.bad[index])
        height, width, _ = self.shapes[index]
        offset = self.offsets[index]
        return self.data[offset : offset + 3 * height * width].view(height, width, 3), self.labels[index]


def _free_memory():
    """Bytes that this machine can still give to programs."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
