"""Which images a process sees when, and the workers that read them. Every image a step sees depends on seed, epoch and
total batch only."""

import os
import signal
import threading

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from distributed.stop_coordinator import SIGNALS, StopCoordinator
from input_pipeline.pipeline import Batch
from utils import print_main, seed_host
from weight_selection.image_files import BadImage


class EvalDataset(Dataset):
    """Images of a data set in a pipeline.

    Args:
        dataset: gives (image, label).
        pipeline: of ``pipeline``.

    Returns:
        (the pipeline's sample, label, what is wrong with the image, which then is a black one).
    """

    def __init__(self, dataset, pipeline):
        self.dataset, self.pipeline = dataset, pipeline

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.readable([index])

    def readable(self, indices):
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
        """A batch of items."""
        samples, labels, problems = zip(*items, strict=True)
        return Batch(*self.pipeline.collate(samples), torch.tensor(labels), [one for some in problems for one in some])


class TrainDataset(EvalDataset):
    """Images whose item (index, epoch) is augmented with randomness from (seed, epoch, index) alone.

    An image that cannot be read is replaced by the next one that can.

    Args:
        dataset, pipeline: as for ``EvalDataset``.
        seed: of the run.
        skip: images that may be replaced in all. After more in a row the run ends anyway: then it is a black one.
    """

    def __init__(self, dataset, pipeline, seed, skip):
        super().__init__(dataset, pipeline)
        self.seed, self.skip = seed, skip

    def __getitem__(self, item):
        index, epoch = item
        seed_host(self.seed, epoch, index)
        return self.readable([(index + ahead) % len(self) for ahead in range(self.skip + 1)])


class BadImages:
    """The training images that could not be read, in all processes; too many end the run.

    Args:
        limit: how many there may be.
        consensus: of the processes.
        known: those of a run that goes on.
    """

    def __init__(self, limit: int, consensus: StopCoordinator, known=()):
        self.limit, self.consensus, self.known, self.found = limit, consensus, set(known), set()

    def add(self, problems: list) -> None:
        """Take those of a batch."""
        self.found.update(problems)
        self._check(self.known | self.found)

    def share(self) -> None:
        """Tell those found here to all processes. All must call it after the same step."""
        if self.limit == 0:
            return
        found = set().union(*self.consensus.gather_objects(sorted(self.found - self.known)))
        for problem in sorted(found):
            print_main(f"warning: {problem}; replaced by another")
        self.known |= found
        self.found.clear()
        self._check(self.known)

    def _check(self, problems):
        if len(problems) > self.limit:
            more = f" ({len(problems)} of them)" if self.limit else ""
            self.consensus.fail(
                f"training image {min(problems)}{more}; repair it, or let up to N be replaced with --skip_bad_images N"
            )


class TrainBatchSampler(Sampler):
    """One process's micro-batches of an epoch, or of the rest of it, as lists of (index, epoch).

    An epoch is one permutation of the images, cut into micro-batches numbered 0, 1, ...; process r takes r, r + world
    size, ... So a step of the optimiser sees the same micro-batches on any number of processes; images that do not
    fill a total batch wait for another epoch's order.

    Args:
        images: number of images in the set.
        batch_size: images in a micro-batch.
        steps: optimiser steps in an epoch.
        update_freq: micro-batches per process and step.
        rank, world_size: this process among all.
        seed: of the run.
    """

    def __init__(self, images, batch_size, steps, update_freq, rank, world_size, seed):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.numbers, self.update_freq = range(rank, steps * update_freq * world_size, world_size), update_freq
        self.epoch = self.first = 0

    def set_position(self, epoch, step):
        """Choose the epoch the next iteration goes through, and from which of its steps on."""
        self.epoch, self.first = epoch, step * self.update_freq

    def __len__(self):
        return len(self.numbers) - self.first

    def __iter__(self):
        order = np.random.RandomState(np.random.SeedSequence((self.seed, self.epoch)).generate_state(4))
        order = order.permutation(self.images).tolist()
        for number in self.numbers[self.first :]:
            yield [(i, self.epoch) for i in order[number * self.batch_size : (number + 1) * self.batch_size]]


class EvalSampler(Sampler):
    """Every ``world_size``-th of ``images`` indices from ``rank`` on: together the processes see each image once."""

    def __init__(self, images, rank, world_size):
        self.indices, self.most = range(rank, images, world_size), -(-images // world_size)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)

    def batches(self, batch_size):
        """How many batches the process with the most of them gets."""
        return -(-self.most // batch_size)


def _obey_only_the_parent(worker):
    """Let no signal end a loader worker but its parent's.

    Launchers, schedulers and Ctrl-C send theirs to every process, and the parent needs batches until it has stopped.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait():
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _loader_options(args, dataset):
    return {
        "dataset": dataset,
        "collate_fn": dataset.collate,
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and args.device == "cuda",
        "worker_init_fn": _obey_only_the_parent,
        "timeout": args.timeout if args.num_workers > 0 else 0,
        "multiprocessing_context": "fork" if args.num_workers > 0 else None,  # not Python 3.14's, which imports anew
    }


def train_loader(dataset, pipeline, batches: TrainBatchSampler, args) -> DataLoader:
    """Loader of micro-batches, as ``Batch``; its ``dataset.pipeline`` makes them a model's inputs."""
    return DataLoader(
        batch_sampler=batches,
        persistent_workers=args.num_workers > 0,
        **_loader_options(args, TrainDataset(dataset, pipeline, args.seed, args.skip_bad_images)),
    )


def eval_loader(dataset, pipeline, args, rank: int, world_size: int) -> DataLoader:
    """Loader of a process's share of the test images, likewise."""
    return DataLoader(
        sampler=EvalSampler(len(dataset), rank, world_size),
        batch_size=args.eval_batch_size or int(1.5 * args.batch_size),
        generator=torch.Generator(),  # the default one is the training's
        **_loader_options(args, EvalDataset(dataset, pipeline)),
    )
