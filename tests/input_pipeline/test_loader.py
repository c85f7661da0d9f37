"""Samplers and loaders: every image once, and the same randomness on any number of processes and workers."""

import random

import numpy as np
import pytest
import torch

from datasets import build_dataset
from distributed.stop_coordinator import StopCoordinator
from input_pipeline.loader import BadImages, BadTestImages, EvalSampler, TrainBatchSampler, eval_loader, train_loader
from input_pipeline.placement import build_pipeline
from training.options import parse_args

CPU = torch.device("cpu")


def options(text, data_path=None):
    return parse_args([*text.split(), *(["--data_path", str(data_path)] if data_path else []), "--device", "cpu"])


def epoch_of_steps(world_size, update_freq, epoch=0, seed=0):
    """For each step of an epoch of 50 images, the micro-batches of 4 that all processes see in it, in order."""
    processes = [TrainBatchSampler(50, 4, 6, update_freq, rank, world_size, seed) for rank in range(world_size)]
    for batches in processes:
        batches.set_position(epoch, 0)
        assert len(batches) == 6 * update_freq
    shares = [list(batches) for batches in processes]
    rounds = [list(micro_batches) for micro_batches in zip(*shares, strict=True)]
    return [sum(rounds[step * update_freq : (step + 1) * update_freq], []) for step in range(6)]


def test_a_step_sees_the_same_images_in_one_process_and_in_two():
    alone = epoch_of_steps(world_size=1, update_freq=2, epoch=3)
    shared = epoch_of_steps(world_size=2, update_freq=1, epoch=3)
    assert alone == shared
    items = [item for step in shared for micro_batch in step for item in micro_batch]
    assert len(items) == len(set(items)) == 48, "no image twice in an epoch; the last 2 fill no batch"
    assert {epoch for _, epoch in items} == {3}
    assert {index for index, _ in items} <= set(range(50))


def test_order_depends_on_epoch_and_seed_and_on_nothing_else():
    def order(epoch, seed):
        steps = epoch_of_steps(1, 2, epoch, seed)
        return tuple(index for step in steps for micro_batch in step for index, _ in micro_batch)

    assert len({order(epoch, seed) for epoch in range(3) for seed in range(3)}) == 9
    np.random.seed(1)  # the global generator has no say
    assert order(2, 1) == order(2, 1)
    left_out = [set(range(50)) - set(order(epoch, 0)) for epoch in range(4)]
    assert len(set.intersection(*left_out)) == 0, "images that wait in one epoch have their turn in another"


def test_augmentation_of_an_image_depends_on_no_worker(image_folder):
    def epoch_of_images(workers, epoch):
        args = options(f"--data_set image_folder --input_size 16 --num_workers {workers}", image_folder)
        dataset, _ = build_dataset(args, train=True)
        pipeline = build_pipeline(args, train=True)
        batches = TrainBatchSampler(len(dataset), 6, 4, 1, rank=0, world_size=1, seed=5)
        batches.set_position(epoch, 0)
        order = [index for batch in batches for index, _ in batch]
        torch.manual_seed(workers)
        loader = train_loader(dataset, pipeline, batches, args, CPU, BadImages(0, StopCoordinator(1)))
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert labels.tolist() == [dataset.samples[index][1] for index in order]
        return dict(zip(order, images, strict=True))

    here, elsewhere, later = epoch_of_images(0, 0), epoch_of_images(2, 0), epoch_of_images(0, 1)
    assert here.keys() == elsewhere.keys()
    assert all(torch.equal(here[index], elsewhere[index]) for index in here)
    both = here.keys() & later.keys()
    assert not any(torch.equal(here[index], later[index]) for index in both), "every epoch augments anew"


@pytest.mark.parametrize(("images", "world_size"), [(13, 2), (10, 4), (8, 2), (3, 4), (7, 1)])
def test_processes_share_test_images_out_without_duplicates(images, world_size):
    args = options("--data_set digits --num_workers 0 --batch_size 2")
    dataset = [(torch.zeros(8, 8, 3, dtype=torch.uint8), index) for index in range(images)]
    pipeline = build_pipeline(args, train=False)
    samplers = [EvalSampler(range(images), rank, world_size) for rank in range(world_size)]
    bad = BadTestImages(StopCoordinator(1))
    shards = [eval_loader(dataset, pipeline, sampler, args, CPU, bad) for sampler in samplers]
    seen = [[index for _, labels in shard for index in labels.tolist()] for shard in shards]
    assert sorted(sum(seen, [])) == list(range(images))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1, "fair shares"


@pytest.mark.parametrize("way", ["--augment_device false", "--augment_device true", "--aa augmix-m5"])
def test_moving_a_batch_to_the_device_draws_no_random_numbers(way):
    # The engine seeds the global generators for a step's mixup and dropout; a draw in between would change the step.
    args = options(f"--data_set digits --num_workers 0 --batch_size 8 --input_size 16 --reprob 1 {way}")
    dataset, _ = build_dataset(args, train=True)
    pipeline = build_pipeline(args, train=True)
    sampler = TrainBatchSampler(len(dataset), 8, 1, 1, rank=0, world_size=1, seed=0)
    (batch,) = train_loader(dataset, pipeline, sampler, args, CPU, BadImages(0, StopCoordinator(1))).workers

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]

    before = states()
    assert pipeline.to_device(batch, CPU).shape == (8, 3, 16, 16)
    assert states() == before
