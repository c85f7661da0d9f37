"""Which images each process sees, and in which order. The order depends only on seed, epoch and total batch size."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class TrainBatchSampler(Sampler):
    """One process's micro-batches of an epoch, or of the rest of it, as lists of (index of an image, epoch).

    An epoch is one permutation of the images, cut into micro-batches numbered 0, 1, ... Process r takes the numbers r,
    r + world size, r + 2 * world size, ... So an optimiser step sees the same micro-batches on any number of
    processes. Images left over after the last whole total batch are not used in this epoch.

    Args:
        images: number of images in the set.
        batch_size: images in a micro-batch.
        steps_per_epoch: optimiser steps in an epoch.
        update_freq: micro-batches of each process in a step.
        rank, world_size: this process's number, and how many processes there are.
        seed: the run's.
    """

    def __init__(self, images, batch_size, steps_per_epoch, update_freq, rank, world_size, seed):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.numbers = range(rank, steps_per_epoch * update_freq * world_size, world_size)
        self.update_freq = update_freq
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
    """One process's test images: every ``world_size``-th index from ``rank`` on, so that each image is seen once."""

    def __init__(self, images: int, rank: int, world_size: int):
        self.indices, self.most = range(rank, images, world_size), -(-images // world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def most_batches(self, batch_size: int) -> int:
        """Number of batches in the process that has the most of them."""
        return -(-self.most // batch_size)
