"""The items of a loader: a worker reads an image, replaces one that cannot be read, and calls the pipeline."""

import torch
from torch.utils.data import Dataset

from input_pipeline.placement import Batch
from utils import seed_host
from weight_selection.image_files import BadImage


class EvalDataset(Dataset):
    """The test images as a pipeline takes them.

    Items are (the pipeline's sample, label, messages about images that could not be read). A black image stands in for
    a test image that cannot be read.

    Args:
        dataset: items are (uint8 (height, width, 3), label).
        pipeline: one of ``placement``.
    """

    def __init__(self, dataset, pipeline):
        self.dataset, self.pipeline = dataset, pipeline

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.first_readable([index])

    def first_readable(self, indices):
        """The item of the first index whose image can be read."""
        problems = []
        for index in indices:
            try:
                image, label = self.dataset[index]
                break
            except BadImage as error:
                problems.append(str(error))
        else:
            image, label = torch.zeros(32, 32, 3, dtype=torch.uint8), 0
        return self.pipeline.sample(image), label, problems

    def collate(self, items) -> Batch:
        """Make a batch of items."""
        samples, labels, problems = zip(*items, strict=True)
        return Batch(*self.pipeline.collate(samples), torch.tensor(labels), [one for some in problems for one in some])


class TrainDataset(EvalDataset):
    """The training images as a pipeline takes them; an index is (number of the image, epoch).

    The randomness of an item depends on (seed, epoch, number of the image) only. The next image that can be read
    replaces one that cannot.

    Args:
        dataset, pipeline: as for ``EvalDataset``.
        seed: the run's.
        max_replaced: how many images the run may replace in all. If more than these fail in a row, the run ends
            anyway, and a black image stands in until it does.
    """

    def __init__(self, dataset, pipeline, seed: int, max_replaced: int):
        super().__init__(dataset, pipeline)
        self.seed, self.max_replaced = seed, max_replaced

    def __getitem__(self, item):
        index, epoch = item
        seed_host(self.seed, epoch, index)
        return self.first_readable([(index + ahead) % len(self) for ahead in range(self.max_replaced + 1)])
