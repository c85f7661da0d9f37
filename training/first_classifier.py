"""The classifier that training starts from, in closed form (``--classifier_init ridge``)."""

from engine import TrainState, predict
from input_pipeline.loader import BadImages, EvalSampler, plain_train_loader
from input_pipeline.placement import build_pipeline
from training.options import Options
from training.setup import RunData
from utils import describe, print_main
from weight_selection.classifier import RidgeSums, classifier_layer, features_of, set_classifier


def fit_first_classifier(options: Options, state: TrainState, data: RunData) -> dict:
    """Fit the model's classifier, and that of its moving average, to its features of all training images.

    All processes must call it; they share the images out. See ``weight_selection.classifier.fit_classifier``.

    Returns:
        ``FittedClassifier.facts``.

    Raises:
        InputError: the classifier is not a single linear layer.
        RunError: an image cannot be read.
    """
    layer = classifier_layer(state.model, data.classes)
    share = state.rank, state.world_size
    sums, bad_images = RidgeSums(data.classes, *share), BadImages(options.skip_bad_images, state.stop_coordinator)
    pipeline, sampler = build_pipeline(options, train=False), EvalSampler(data.train_images, *share)
    loader = plain_train_loader(data.train_set, pipeline, sampler, options, state.device, bad_images)
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
    print_main(f"classifier fitted to the training images: {describe(fitted.facts())}")
    return fitted.facts()
