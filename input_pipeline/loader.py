"""The loaders of training and of the test, which yield batches on the device; their workers read and collate."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader

from distributed.stop_coordinator import SIGNALS
from input_pipeline.bad_images import BadImages, BadTestImages
from input_pipeline.cache import CachedDataset
from input_pipeline.items import EvalDataset, TrainDataset
from input_pipeline.placement import TransformInWorkers, TransformOnDevice, TransformOneByOne
from input_pipeline.samplers import EvalSampler, TrainBatchSampler


@dataclass(frozen=True)
class DeviceLoader:
    """Yields a model's inputs and targets on the device: float32 (batch, 3, size, size), normalised; int64 (batch,).

    It draws no random numbers itself: it may be called before or after the generators of the step are seeded.

    Attributes:
        workers: PyTorch's loader, which yields each ``Batch`` as a worker made it.
        pipeline: the one that the workers call.
        sampler: chooses the images of this process.
        batch_size: images in a batch; the last one of a test may be smaller.
        bad_images: its ``add`` is called with each batch's messages, before the batch is yielded.
        device: where the batches go.
    """

    workers: DataLoader
    pipeline: TransformOneByOne | TransformInWorkers
    sampler: TrainBatchSampler | EvalSampler
    batch_size: int
    bad_images: BadImages | BadTestImages
    device: torch.device

    def on(self, device: torch.device) -> "DeviceLoader":
        """The same loader with its batches on another device."""
        return replace(self, device=device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.workers:
            self.bad_images.add(batch.problems)
            yield self.pipeline.to_device(batch, self.device), batch.labels.to(self.device, non_blocking=True)


def train_loader(dataset, pipeline, sampler: TrainBatchSampler, args, device, bad_images: BadImages) -> DeviceLoader:
    """The loader of this process's micro-batches.

    Args:
        dataset: items are (uint8 (height, width, 3), label); of a ``CachedDataset``, the images move to the device if
            the pipeline transforms them there.
        pipeline: from ``build_pipeline``.
        sampler: its ``set_position`` says which epoch and step the next iteration begins with.
        args: the checked options.
        device: where to yield batches.
        bad_images: takes note of images that cannot be read.
    """
    _move_to_device(dataset, pipeline, device)
    workers = DataLoader(
        batch_sampler=sampler,
        persistent_workers=args.num_workers > 0,
        **_loader_options(args, TrainDataset(dataset, pipeline, args.seed, args.skip_bad_images)),
    )
    return DeviceLoader(workers, pipeline, sampler, sampler.batch_size, bad_images, device)


def eval_loader(dataset, pipeline, sampler: EvalSampler, args, device, bad_images: BadTestImages) -> DeviceLoader:
    """The loader of this process's share of the test images; arguments as for ``train_loader``."""
    _move_to_device(dataset, pipeline, device)
    batch_size = args.eval_batch_size or int(1.5 * args.batch_size)
    workers = DataLoader(
        sampler=sampler,
        batch_size=batch_size,
        generator=torch.Generator(),  # the default generator is the training's
        **_loader_options(args, EvalDataset(dataset, pipeline)),
    )
    return DeviceLoader(workers, pipeline, sampler, batch_size, bad_images, device)


def _move_to_device(dataset, pipeline, device):
    if isinstance(dataset, CachedDataset) and isinstance(pipeline, TransformOnDevice):
        pipeline.resident = dataset.data.to(device)


def _loader_options(args, dataset):
    return {
        "dataset": dataset,
        "collate_fn": dataset.collate,
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and args.device == "cuda",
        "worker_init_fn": _obey_only_the_parent,
        "timeout": args.timeout if args.num_workers > 0 else 0,
        # A forked worker shares the images in memory; Python 3.14's default would import everything anew.
        "multiprocessing_context": "fork" if args.num_workers > 0 else None,
    }


def _obey_only_the_parent(worker):
    """Let a loader worker end only at a signal from its parent.

    Launchers, schedulers and Ctrl-C send their signals to every process, but the parent needs batches until it stops.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait():
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
