"""timm's image transforms, for training and for the test."""

from timm.data import auto_augment, create_transform

from weight_selection.errors import InputError
from weight_selection.sources.teachers import normalization


def build_transform(args, train: bool):
    """timm's transform from a PIL image to a normalised (3, input_size, input_size) tensor.

    Training: random resized crop, flip, RandAugment, random erasing (Table 13 of the paper). Test: resize the shorter
    side to 256/224 of the input size and crop the centre; from 384 pixels on, squash the whole image, as ConvNeXt does.

    Raises:
        InputError: timm knows no policy of the name in ``--aa``.
    """
    mean, std = normalization(args.imagenet_default_mean_and_std)
    common = {"input_size": args.input_size, "mean": mean, "std": std}
    if train:
        try:
            transform = create_transform(
                **common,
                is_training=True,
                scale=tuple(args.scale),
                hflip=args.hflip,
                color_jitter=args.color_jitter,
                auto_augment=None if args.aa == "none" else args.aa,
                interpolation=args.train_interpolation,
                re_prob=args.reprob,
                re_mode=args.remode,
                re_count=args.recount,
            )
        except (AssertionError, ValueError, KeyError) as error:  # timm refuses a policy with any of these
            raise InputError(f"--aa {args.aa}: no policy of timm's; such as rand-m9-mstd0.5-inc1, or none") from error
        return _with_posterize_to_black(transform)
    squash = args.crop_pct is None and args.input_size >= 384
    return create_transform(
        **common,
        is_training=False,
        interpolation="bicubic",
        crop_pct=1.0 if squash else args.crop_pct or 224 / 256,
        crop_mode="squash" if squash else "center",
    )


def _with_posterize_to_black(transform):
    """Let RandAugment posterize to 0 bits: the paper's policy asks for that, and newer versions of Pillow refuse it."""
    for step in transform.transforms:
        operations = getattr(step, "ops", None) or [op for group in getattr(step, "policy", ()) for op in group]
        for operation in operations:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image, bits, **_):
    """timm's operation; 0 bits give a black image, as older versions of Pillow did."""
    return image.point(lambda value: 0) if bits == 0 else auto_augment.posterize(image, bits)
