"""The loaders of training and of the test, which yield batches on the device.

A sampler chooses the images of this process. A worker reads them, replaces those that cannot be read, and calls the
pipeline of ``placement``. The order of the images depends only on seed, epoch and total batch size.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from distributed.parent import end_with_parent
from distributed.stop_coordinator import SIGNALS, StopCoordinator
from input_pipeline.cache import CachedDataset
from input_pipeline.placement import Batch, Pipeline, TransformOnDevice
from utils import print_main, seed_host
from weight_selection.image_files import BadImage


class TrainBatchSampler(Sampler):
    """One process's micro-batches of an epoch, or of the rest of it, as lists of (index of an image, epoch).

    An epoch is one permutation of all ``images``, cut into micro-batches of ``batch_size`` numbered 0, 1, ... Process r
    takes the numbers r, r + world size, r + 2 * world size, ... and ``update_freq`` of them for an optimiser step. So a
    step sees the same micro-batches on any number of processes. Images left over after the last step are not used in
    this epoch.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        steps_per_epoch: int,
        update_freq: int,
        rank: int,
        world_size: int,
        seed: int,
    ):
        self.images, self.batch_size, self.update_freq, self.seed = images, batch_size, update_freq, seed
        self.numbers = range(rank, steps_per_epoch * update_freq * world_size, world_size)
        self.epoch = self.first = 0

    def set_position(self, epoch: int, step: int) -> None:
        """Let the next iteration go through ``epoch`` from this one of its steps on; both count from 0."""
        self.epoch, self.first = epoch, step * self.update_freq

    def __len__(self) -> int:
        return len(self.numbers) - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.RandomState(np.random.SeedSequence((self.seed, self.epoch)).generate_state(4))
        order = order.permutation(self.images).tolist()
        for number in self.numbers[self.first :]:
            yield [(i, self.epoch) for i in order[number * self.batch_size : (number + 1) * self.batch_size]]


class EvalSampler(Sampler):
    """One process's share of images: every ``world_size``-th index from number ``rank`` on. Each is seen once."""

    def __init__(self, indices: Sequence[int], rank: int, world_size: int):
        self.indices, self.most = indices[rank::world_size], -(-len(indices) // world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def most_batches(self, batch_size: int) -> int:
        """Number of batches in the process that has the most of them."""
        return -(-self.most // batch_size)


class EvalDataset(Dataset):
    """The test images as ``pipeline`` takes them: (its sample, label, messages about images that could not be read).

    A black image stands in for a test image that cannot be read. The items of ``dataset`` are (uint8 (height, width,
    3), label).
    """

    def __init__(self, dataset: Dataset, pipeline: Pipeline):
        self.dataset, self.pipeline = dataset, pipeline

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.first_readable([index])

    def first_readable(self, indices: Sequence[int]) -> tuple:
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

    def collate(self, items: list[tuple]) -> Batch:
        """Make a batch of items."""
        samples, labels, problems = zip(*items, strict=True)
        return Batch(*self.pipeline.collate(samples), torch.tensor(labels), sum(problems, []))


class TrainDataset(EvalDataset):
    """The training images as a pipeline takes them; an index is (number of the image, epoch).

    The randomness of an item depends on (seed, epoch, number of the image) only. The next image that can be read
    replaces one that cannot. If more than ``max_replaced`` fail in a row, the run ends anyway, and a black image stands
    in until it does.
    """

    def __init__(self, dataset: Dataset, pipeline: Pipeline, seed: int, max_replaced: int):
        super().__init__(dataset, pipeline)
        self.seed, self.max_replaced = seed, max_replaced

    def __getitem__(self, item):
        index, epoch = item
        seed_host(self.seed, epoch, index)
        return self.first_readable([(index + ahead) % len(self) for ahead in range(self.max_replaced + 1)])


def _obey_only_the_parent(worker):
    """Let a loader worker end only with its parent, or at a signal from it.

    Launchers, schedulers and Ctrl-C send their signals to every process, but the parent needs batches until it stops.
    """
    parent = multiprocessing.parent_process().pid
    end_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait():
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class BadImages:
    """The training images that could not be read, in all processes; a run with more than ``limit`` of them ends.

    ``known`` are those that were found before an interruption of the run.
    """

    def __init__(self, limit: int, coordinator: StopCoordinator, known: Iterable[str] = ()):
        self.limit, self.coordinator, self.known, self.found = limit, coordinator, set(known), set()

    def add(self, problems: list[str]) -> None:
        """Note the messages of a batch; too many in this process end the run."""
        self.found.update(problems)
        self._check(self.known | self.found)

    def share(self) -> None:
        """Tell all processes which images this one found. All processes must call it after the same step."""
        if self.limit == 0:
            return
        found = set().union(*self.coordinator.gather_objects(sorted(self.found - self.known)))
        for problem in sorted(found):
            print_main(f"warning: {problem}; replaced by another")
        self.known |= found
        self.found.clear()
        self._check(self.known)

    def _check(self, problems):
        if len(problems) > self.limit:
            more = f" ({len(problems)} of them)" if self.limit else ""
            self.coordinator.fail(
                f"training image {min(problems)}{more}; repair it, or let up to N be replaced with --skip_bad_images N"
            )


class BadTestImages:
    """Ends the run at the first test image that cannot be read: accuracy is over all test images."""

    def __init__(self, coordinator: StopCoordinator):
        self.coordinator = coordinator

    def add(self, problems: list[str]) -> None:
        """Note the messages of a batch; any ends the run."""
        if problems:
            self.coordinator.fail(f"test image {problems[0]}; repair it: accuracy is over all test images")


@dataclass(frozen=True)
class DeviceLoader:
    """Yields a model's inputs and targets on the device: float32 (batch, 3, size, size), normalised; int64 (batch,).

    It draws no random numbers itself: it may be called before or after the generators of the step are seeded.
    """

    workers: DataLoader  # yields each ``Batch`` as a worker made it
    pipeline: Pipeline  # the one that the workers call
    sampler: TrainBatchSampler | EvalSampler
    batch_size: int  # the last batch of a test may be smaller
    bad_images: BadImages | BadTestImages  # notes each batch's messages before the batch is yielded
    device: torch.device

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.workers:
            self.bad_images.add(batch.problems)
            yield self.pipeline.to_device(batch, self.device), batch.labels.to(self.device, non_blocking=True)


def train_loader(
    dataset: Dataset,
    pipeline: Pipeline,
    sampler: TrainBatchSampler,
    args: SimpleNamespace,
    device: torch.device,
    bad_images: BadImages,
) -> DeviceLoader:
    """The loader of this process's micro-batches, from the position of ``sampler`` on.

    The items of ``dataset`` are (uint8 (height, width, 3), label). The images of a ``CachedDataset`` move to the device
    if ``pipeline``, which is from ``build_pipeline``, transforms them there.
    """
    items = TrainDataset(dataset, pipeline, args.seed, args.skip_bad_images)
    workers = _workers(items, args, device, batch_sampler=sampler, persistent_workers=args.num_workers > 0)
    return DeviceLoader(workers, pipeline, sampler, sampler.batch_size, bad_images, device)


def plain_train_loader(
    dataset: Dataset,
    pipeline: Pipeline,
    sampler: EvalSampler,
    args: SimpleNamespace,
    device: torch.device,
    bad_images: BadImages,
) -> DeviceLoader:
    """The loader of the sampler's training images in their order, brought to the model like test images.

    ``pipeline`` is from ``build_pipeline`` for the test, and is not shared with another loader. The other arguments are
    those of ``train_loader``.
    """
    items = TrainDataset(dataset, pipeline, args.seed, args.skip_bad_images)
    return _in_order(items, [(index, 0) for index in sampler], sampler, args, device, bad_images)


def eval_loader(
    dataset: Dataset,
    pipeline: Pipeline,
    sampler: EvalSampler,
    args: SimpleNamespace,
    device: torch.device,
    bad_images: BadTestImages,
) -> DeviceLoader:
    """The loader of this process's share of the test images; arguments as for ``train_loader``."""
    return _in_order(EvalDataset(dataset, pipeline), sampler, sampler, args, device, bad_images)


def _in_order(items, numbers, sampler, args, device, bad_images) -> DeviceLoader:
    """A loader of ``items`` by their ``numbers``, which are those of ``sampler``, in batches of the test's size."""
    batch_size = args.eval_batch_size or int(1.5 * args.batch_size)
    own = torch.Generator()  # the default generator is the training's
    workers = _workers(items, args, device, sampler=numbers, batch_size=batch_size, generator=own)
    return DeviceLoader(workers, items.pipeline, sampler, batch_size, bad_images, device)


def _workers(items, args, device, **options) -> DataLoader:
    if isinstance(items.dataset, CachedDataset) and isinstance(items.pipeline, TransformOnDevice):
        items.pipeline.resident = items.dataset.data.to(device)
    return DataLoader(
        items,
        collate_fn=items.collate,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and args.device == "cuda",
        worker_init_fn=_obey_only_the_parent,
        timeout=args.timeout if args.num_workers > 0 else 0,
        # A forked worker shares the images in memory; Python 3.14's default would import everything anew.
        multiprocessing_context="fork" if args.num_workers > 0 else None,
        **options,
    )
