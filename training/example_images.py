"""Some training images as a model sees them, to be looked at."""

import torch

from engine import TrainState
from input_pipeline.loader import DeviceLoader
from training.options import Options
from utils import seed_everything
from weight_selection.sources.teachers import normalization

IMAGES = 16  # to show; an even number, as mixup takes


def example_images(options: Options, state: TrainState, loader: DeviceLoader) -> dict[str, torch.Tensor]:
    """The first images of the first epoch, augmented; and if the run mixes images, mixed as well.

    The generators end in another state than before. Training seeds them before it uses them.

    Returns:
        {augmented, mixed: float32 (up to 16, 3, size, size) on the CPU, from 0 to 1}.
    """
    dataset = loader.workers.dataset
    batch = dataset.collate([dataset[item] for item in next(iter(loader.sampler))[:IMAGES]])
    images = loader.pipeline.to_device(batch, state.device)
    examples = {"augmented": images}
    if state.mixup is not None:
        seed_everything(options.seed, 0, 0, 1)  # as for the first micro-batch
        examples["mixed"], _ = state.mixup(images.clone(), batch.labels.to(state.device))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalization(options.imagenet_default_mean_and_std))
    return {name: (values.cpu() * std + mean).clamp(0, 1) for name, values in examples.items()}
