"""The classifier that training starts from, in closed form (``--classifier_init ridge``)."""

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from engine import TrainState, autocast, predict
from input_pipeline.loader import BadImages, DeviceLoader, EvalSampler, plain_train_loader
from input_pipeline.placement import build_pipeline
from training.options import Options
from training.setup import RunData
from utils import describe, print_main
from weight_selection.classifier import RidgeSums, classifier_layer, features_of, set_classifier
from weight_selection.errors import InputError
from weight_selection.modules import evaluating

SETTLING_IMAGES = 1024


def fit_first_classifier(options: Options, state: TrainState, data: RunData) -> dict:
    """Fit the model's classifier, and that of its moving average, to its features of all training images.

    Before, batch normalisations get the statistics that they will have in training. All processes must call it; they
    share the images out. See ``weight_selection.classifier.fit_classifier``.

    Returns:
        ``FittedClassifier.facts``.

    Raises:
        InputError: the classifier is not a single linear layer.
        RunError: an image cannot be read.
    """
    try:
        layer = classifier_layer(state.model, data.classes)
    except InputError as error:
        named = f"--classifier_init ridge: the classifier of {options.model} is not a single linear layer"
        raise InputError(f"{named}; leave it out") from error
    share = state.rank, state.world_size
    sums, bad_images = RidgeSums(data.classes, *share), BadImages(options.skip_bad_images, state.stop_coordinator)

    def load(sampler, options):
        pipeline = build_pipeline(options, train=False)
        return plain_train_loader(data.train_set, pipeline, sampler, options, state.device, bad_images)

    norms = [norm for norm in state.model.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    if norms:
        mixed = np.random.default_rng(options.seed).permutation(data.train_images)  # files lie class by class
        as_in_training = options.replace(eval_batch_size=options.batch_size)
        loader = load(EvalSampler(mixed[:SETTLING_IMAGES].tolist(), 0, 1), as_in_training)
        settle_batch_norms(norms, state, loader)
    loader = load(EvalSampler(range(data.train_images), *share), options)
    with features_of(layer) as caught:
        for _, labels in predict(state.model, loader, state.amp_dtype):
            sums.add(caught.pop(), labels)
    bad_images.share()
    state.stop_coordinator.settle()
    total = RidgeSums(data.classes)
    total.add_all(state.stop_coordinator.gather_objects(sums))
    fitted = total.solve()
    for model in filter(None, (state.model, state.ema and state.ema.module)):
        set_classifier(classifier_layer(model, data.classes), fitted)
    print_main(f"classifier fitted to the training images: {describe(fitted.summary())}")
    return fitted.summary()


@torch.no_grad()
def settle_batch_norms(norms: list[_BatchNorm], state: TrainState, loader: DeviceLoader) -> None:
    """Give all of a model's batch normalisations, and those of its moving average, the statistics of some batches.

    Selected weights come with their teacher's statistics. In training every batch has its own, so the features change
    with the first step, and a classifier that was fitted before no longer suits them. All processes must see the same
    images. PyTorch's ``update_bn`` would also switch dropout on.
    """
    momenta = [norm.momentum for norm in norms]
    with evaluating(state.model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for number, (images, _) in enumerate(loader):
            if number > 0 and len(images) < loader.batch_size:
                break  # it would count as much as a full batch
            with autocast(state.device, state.amp_dtype):
                state.model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    if state.ema:
        state.ema.module.load_state_dict(state.model.state_dict())
