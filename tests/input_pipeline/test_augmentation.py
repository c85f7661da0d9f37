"""Augmentation in batches: timm's draws, and Pillow's pixels up to a level in a stated share of them."""

import pickle
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from timm.data import auto_augment
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from input_pipeline import operations, resizing
from input_pipeline.augmentation import Augmentation, Unsupported
from input_pipeline.placement import _posterize, build_transform
from input_pipeline.resizing import Pixels
from training.options import parse_args
from utils import seed_everything

FILL = (124, 116, 104)


def natural(height, width, seed=0):
    """(height, width, 3) uint8: smooth colours, some too dark or too light, with noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return np.clip(np.asarray(coarse) * 1.2 - 25 + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def extremes(side=48):
    """The last three are flat."""
    checks = np.random.default_rng(1).integers(0, 2, (side, side, 3), dtype=np.uint8) * 255
    flat = [np.full((side, side, 3), value, np.uint8) for value in (0, 77, 255)]
    return [natural(side, side), natural(side, side, 1), natural(side, side, 2) // 8 + 90, checks, *flat]


def pixels_of(arrays):
    lengths = torch.tensor([array.size for array in arrays])
    data = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    return Pixels(data, lengths.cumsum(0) - lengths, torch.tensor([array.shape[:2] for array in arrays]))


def to_batch(arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def transform_of(text, train=True):
    return build_transform(parse_args(["--data_set", "CIFAR10", *text.split()]), train)


def assert_levels(ours, theirs, most, share):
    """uint8 results differ by at most ``most`` levels, in at most ``share`` of the values."""
    distance = (ours.int() - theirs.int()).abs()
    assert distance.max() <= most
    assert (distance > 0).float().mean() <= share


# ---------------------------------------------------------------------------------------------------------
# Operations


FACTORS = (0.1, 0.19, 0.5, 0.999, 1.0, 1.1, 1.81, 1.9)
# At 0.45 of 48 pixels the bilinear kernel gives a whole number in every fifth case, which Pillow truncates or not by
# the last bit of its double precision; 3 % of the pixels would differ.
SHARES = (-0.4487, 0.405, 0.1234567, 0.0, 1.2)
LEVELS = {
    "auto_contrast": (None,),
    "equalize": (None,),
    "invert": (None,),
    "posterize": range(9),
    "solarize": (0, 1, 26, 128, 255, 256),
    "solarize_add": (0, 40, 99, 128),
    "color": FACTORS,
    "contrast": FACTORS,
    "brightness": FACTORS,
    "sharpness": FACTORS,
    "desaturate": (0.5, 0.77, 1.0),
    "rotate": (-30.0, 27.0, 12.3456, 0.5, 0.0),
    "shear_x": (-0.3, 0.27, 0.123456, 0.0),
    "shear_y": (-0.3, 0.27, 0.123456, 0.0),
    "translate_x_rel": SHARES,
    "translate_y_rel": SHARES,
    "translate_x_abs": (3.0, -7.25, 20.1234, 100.0),
    "translate_y_abs": (3.0, -7.25, 20.1234, 100.0),
}


def by_pillow(name, arrays, level, kernel=Image.BICUBIC):
    function = _posterize if name == "posterize" else getattr(auto_augment, name)
    level = () if level is None else (level,)
    results = [function(Image.fromarray(one), *level, resample=kernel, fillcolor=FILL) for one in arrays]
    return to_batch([np.asarray(result) for result in results])


def by_torch(function, images, level, cubic=True):
    level, cubic = (torch.full((len(images),), float(value or 0), dtype=torch.float64) for value in (level, cubic))
    before = images.clone()
    result = function(images, level, cubic, torch.tensor(FILL, dtype=torch.float32).view(3, 1, 1))
    assert torch.equal(images, before), "an operation leaves what it is given"
    return result


def test_every_operation_is_tested():
    assert LEVELS.keys() == operations.OPERATIONS.keys()


@pytest.mark.parametrize("name", sorted(operations.OPERATIONS.keys() - operations.RESAMPLED))
def test_operations_on_values_are_pillows(name):
    for level in LEVELS[name]:
        theirs = by_pillow(name, extremes(), level)
        assert torch.equal(by_torch(operations.OPERATIONS[name], to_batch(extremes()), level), theirs)
        alone = [by_torch(operations.ON_CPU[name], to_batch([one]), level) for one in extremes()]
        assert torch.equal(torch.cat(alone), theirs)


@pytest.mark.parametrize("cubic", [True, False])
@pytest.mark.parametrize("name", sorted(operations.RESAMPLED))
def test_affine_operations_are_pillows(name, cubic):
    kernel = Image.BICUBIC if cubic else Image.BILINEAR
    share = 0.003  # those next to a whole number, as Pillow truncates
    for level in LEVELS[name]:
        theirs = by_pillow(name, extremes(), level, kernel)
        ours = by_torch(operations.OPERATIONS[name], to_batch(extremes()), level, cubic)
        assert_levels(ours, theirs, 1, share)
        assert torch.equal(ours[-3:], theirs[-3:])
        alone = [by_torch(operations.ON_CPU[name], to_batch([one]), level, cubic) for one in extremes()]
        assert_levels(torch.cat(alone), theirs, 0 if name == "rotate" else 1, share)


def test_equalize_of_few_pixels():
    few = [natural(15, 17, seed) for seed in range(20)]  # 255 pixels: each step of the table is of one or none
    assert torch.equal(
        by_torch(operations.OPERATIONS["equalize"], to_batch(few), None), by_pillow("equalize", few, None)
    )


# ---------------------------------------------------------------------------------------------------------
# Resizing

BOXES = [  # height and width of the image; top, left, height and width of the box
    ((32, 32), (0, 0, 32, 32)),
    ((32, 32), (5, 20, 9, 12)),
    ((90, 120), (0, 0, 90, 120)),
    ((90, 120), (0, 70, 48, 50)),
    ((90, 120), (10, 72, 48, 48)),
    ((200, 100), (20, 10, 180, 60)),  # along columns first
    ((200, 100), (0, 30, 160, 70)),
    ((200, 100), (199, 99, 1, 1)),
]


@pytest.mark.parametrize(
    ("resize", "cubic", "share"),
    [
        (resizing.one_by_one, True, 0.01),
        (resizing.one_by_one, False, 0.01),
        (resizing.by_products, True, 0.0005),
        (resizing.by_products, False, 0.008),
    ],
)
def test_resizing_is_pillows(resize, cubic, share):
    side = 47  # a prime: simple ratios give many exact halves, which are rounded by the last bit of a weight
    arrays = [natural(*size, seed) for seed, (size, _) in enumerate(BOXES)]
    kernel = InterpolationMode.BICUBIC if cubic else InterpolationMode.BILINEAR
    images = [
        TF.resized_crop(Image.fromarray(one), *box, (side, side), kernel)
        for one, (_, box) in zip(arrays, BOXES, strict=True)
    ]
    for flip in (0, 1):
        theirs = to_batch([np.asarray(TF.hflip(image) if flip else image) for image in images])
        crops = torch.tensor([[*box, side, side, 0, 0, cubic, flip] for _, box in BOXES])
        pixels = pixels_of(arrays)
        ours = resize(pixels.images() if resize is resizing.one_by_one else pixels, crops, side)
        for mine, its in zip(ours, theirs, strict=True):
            assert_levels(mine, its, 1, share)


# ---------------------------------------------------------------------------------------------------------
# The whole

TRAIN = [
    ("--input_size 64 --aa rand-m9-mstd0.5-inc1", (32, 32)),
    ("--input_size 48 --aa rand-m7-n3-mstd0.5 --recount 3 --remode rand", (75, 50)),
    ("--input_size 48 --aa rand-m9-n4-mstd101-tweights --remode const", (40, 60)),
    ("--input_size 48 --aa original --train_interpolation random --hflip 0", (50, 75)),
    ("--input_size 47 --aa v0 --train_interpolation bilinear --imagenet_default_mean_and_std false", (75, 50)),
    ("--input_size 48 --aa none --color_jitter 0.4 --train_interpolation random", (32, 32)),
    ("--input_size 224 --aa rand-m9-mstd0.5-inc1 --reprob 0 --scale 0.5 1", (32, 32)),
    ("--input_size 48 --aa rand-m20-n2-mmax30-mstd2 --reprob 1", (60, 140)),
]
EVAL = [
    ("--input_size 64", (32, 32)),
    ("--input_size 48", (75, 50)),
    ("--input_size 48", (50, 133)),
    ("--input_size 48 --crop_pct 1", (301, 64)),
    ("--input_size 384", (75, 50)),
]


def test_a_random_box_has_a_pixel_at_least():
    augmentation = Augmentation(transform_of("--input_size 16 --scale 0.0001 0.0001"))
    for top, left, height, width, *_ in (augmentation.draw(8, 8).crop for _ in range(50)):
        assert height == width == 1 and top < 8 and left < 8


def states():
    return random.getstate(), [str(part) for part in np.random.get_state()]


@pytest.mark.parametrize(
    ("text", "size", "train"), [(*case, True) for case in TRAIN] + [(*case, False) for case in EVAL]
)
def test_a_seed_means_what_it_means_to_timm(text, size, train):
    transform = transform_of(text, train)
    augmentation = Augmentation(transform)
    count = 3 if not train or augmentation.size > 100 else 40
    arrays, theirs, draws = [natural(*size, seed) for seed in range(count)], [], []
    for index, array in enumerate(arrays):
        seed_everything(1, 2, index)
        theirs.append(transform(Image.fromarray(array)))
        after = states()
        seed_everything(1, 2, index)
        draws.append(augmentation.draw(*size))
        assert states() == after
    theirs, packed = torch.stack(theirs), pickle.loads(pickle.dumps(augmentation.pack(draws)))

    erased = torch.zeros(theirs.shape, dtype=torch.bool)
    for row, _, top, left, height, width in packed.erased:
        erased[row, :, top : top + height, left : left + width] = True
    mean, std = (torch.as_tensor(values).view(3, 1, 1) for values in (augmentation.mean, augmentation.std))
    for batched, share in ((False, 0.03), (True, 0.008)):
        images = augmentation.apply(pixels_of(arrays), packed, batched)
        ours = augmentation.finish(images, packed)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.equal(ours[~erased], ((images / 255 - mean) / std)[~erased])
        levels = ((ours - theirs) * std * 255).masked_fill(erased, 0).abs().round()
        # A step of the table of an operation makes one level into more; a wrong draw makes most pixels differ.
        assert (levels > 0).float().mean() <= share
        assert (levels > 0).float().mean((1, 2, 3)).max() <= 0.12
        assert (levels > 1).float().mean() <= 0.005
    if "const" in text:
        assert erased.any() and torch.equal(ours[erased], theirs[erased])


def test_erased_boxes_are_timms():
    transform = transform_of("--input_size 48 --aa none --reprob 1 --recount 3 --remode pixel")
    augmentation, boxes = Augmentation(transform), set()
    for seed in range(30):
        seed_everything(seed)
        erased = torch.zeros(3, 48, 48, dtype=torch.bool)
        for _, top, left, height, width in (draws := augmentation.draw(32, 32)).erased:
            erased[:, top : top + height, left : left + width] = True
        boxes.add(len(draws.erased))
        seed_everything(seed)
        grey = (transform(Image.new("RGB", (32, 32), (90, 90, 90))) * augmentation.std + augmentation.mean) * 255
        noise = (grey - grey[:, ~erased[0]].mean(1)[:, None, None]).abs() > 1e-3
        assert torch.equal(noise, erased)
    assert boxes == {1, 2, 3}


def test_noise_is_of_the_kind_that_was_asked_for():
    def one(mode):
        augmentation = Augmentation(transform_of(f"--input_size 48 --aa none --reprob 1 --remode {mode}"))
        seed_everything(3)
        packed = augmentation.pack([augmentation.draw(32, 32)])
        (_, seed, top, left, height, width), *_ = packed.erased
        result = augmentation.finish(torch.full((1, 3, 48, 48), 7, dtype=torch.uint8), packed)
        torch.manual_seed(seed)
        return result[0, :, top : top + height, left : left + width], height, width

    box, height, width = one("pixel")
    assert torch.equal(box, torch.empty(3, height, width).normal_())
    box, height, width = one("rand")
    assert torch.equal(box, torch.empty(3, 1, 1).normal_().expand(3, height, width))
    box, *_ = one("const")
    assert not box.any()


@pytest.fixture(scope="module")
def mixed():
    """An augmentation, images of several sizes, and their draws."""
    augmentation = Augmentation(transform_of("--input_size 48 --aa rand-m9-n3-mstd0.5-inc1"))
    arrays, draws = [], []
    for seed in range(70):
        seed_everything(seed)
        arrays.append(natural(30 + seed, 100 - seed, seed))
        draws.append(augmentation.draw(*arrays[-1].shape[:2]))
    return augmentation, arrays, draws


@pytest.mark.parametrize("batched", [False, True])
def test_an_image_is_the_same_in_any_batch(mixed, batched):
    augmentation, arrays, draws = mixed
    together = augmentation.apply(pixels_of(arrays), augmentation.pack(draws), batched)
    order = list(range(69, -1, -3))
    some = augmentation.pack([draws[index] for index in order])
    shuffled = augmentation.apply(pixels_of([arrays[index] for index in order]), some, batched)
    assert_levels(shuffled, together[order], 1 if batched else 0, 1e-4 if batched else 0)
    for index in (0, 33, 66):
        alone = augmentation.apply(pixels_of(arrays[index : index + 1]), augmentation.pack([draws[index]]), batched)
        assert_levels(alone[0], together[index], 1 if batched else 0, 1e-4 if batched else 0)


def test_large_images_do_not_swell_a_batch(monkeypatch):
    sizes, gathered = [(40, 50), (300, 20), (30, 60), (41, 50)] * 3, []
    arrays = [natural(*size, seed) for seed, size in enumerate(sizes)]
    augmentation = Augmentation(transform_of("--input_size 32", train=False))
    packed = augmentation.pack([augmentation.draw(*size) for size in sizes])
    whole, part = augmentation.apply(pixels_of(arrays), packed, True), resizing._part

    def observed(data, crops, offsets, sizes, size):
        gathered.append(len(crops) * int(sizes.max()) ** 2)
        return part(data, crops, offsets, sizes, size)

    monkeypatch.setattr(resizing, "AT_ONCE", 100_000)
    monkeypatch.setattr(resizing, "_part", observed)
    assert_levels(augmentation.apply(pixels_of(arrays), packed, True), whole, 1, 1e-3)
    assert max(gathered) <= 100_000 and len(gathered) < len(arrays)


@pytest.mark.parametrize("batched", [False, True])
def test_a_batch_may_lie_in_the_buffer_of_a_whole_set(mixed, batched):
    augmentation, arrays, draws = mixed
    everything, chosen = pixels_of(arrays), [5, 60, 17, 5]
    resident = Pixels(everything.data, everything.offsets[chosen], everything.sizes[chosen])
    packed = augmentation.pack([draws[index] for index in chosen])
    own = augmentation.apply(pixels_of([arrays[index] for index in chosen]), packed, batched)
    assert torch.equal(augmentation.apply(resident, packed, batched), own)


def test_batches_without_any_operation():
    augmentation = Augmentation(transform_of("--input_size 48", train=False))
    packed = augmentation.pack([augmentation.draw(60, 60)])
    assert not packed.groups and not packed.erased
    assert augmentation.apply(pixels_of([np.full((60, 60, 3), 9, np.uint8)]), packed, False).eq(9).all()


def test_statistics_of_many_images_are_timms():
    transform = transform_of("--input_size 32 --reprob 0.5")
    augmentation, count = Augmentation(transform), 600
    arrays = [natural(32, 32, seed % 20) for seed in range(count)]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    theirs = torch.stack([transform(Image.fromarray(array)) for array in arrays])
    draws = [augmentation.draw(32, 32) for _ in arrays]
    packed = augmentation.pack(draws)
    ours = augmentation.finish(augmentation.apply(pixels_of(arrays), packed, False), packed)

    for figure in (torch.mean, torch.std):
        mine, its = (figure(images, (1, 2, 3)) for images in (ours, theirs))
        error = (mine.var() / count + its.var() / count).sqrt()
        assert (mine.mean() - its.mean()).abs() < 4 * error
    share = sum(bool(one.erased) for one in draws) / count
    assert abs(share - 0.5) < 4 * (0.25 / count) ** 0.5


def test_a_transform_is_left_as_it_is():
    transform = transform_of("--input_size 48 --aa rand-m9-mstd0.5-inc1 --reprob 1")

    def result():
        seed_everything(4)
        return transform(Image.fromarray(natural(32, 32)))

    before = result()
    Augmentation(transform).draw(32, 32)
    assert torch.equal(result(), before)


@pytest.mark.parametrize(
    ("text", "named"),
    [("--aa 3a", "GaussianBlur"), ("--aa augmix-m5", "AugMix")],
)
def test_what_has_no_batched_form_is_named(text, named):
    with pytest.raises(Unsupported, match=named):
        Augmentation(transform_of(f"--input_size 48 {text}"))


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (transforms.RandomVerticalFlip(), "RandomVerticalFlip"),
        (transforms.ColorJitter(hue=0.1), "hue"),
        (transforms.RandomGrayscale(), "RandomGrayscale"),
    ],
)
def test_steps_that_have_no_batched_form_are_named(step, named):
    transform = transform_of("--input_size 48")
    transform.transforms.insert(1, step)
    with pytest.raises(Unsupported, match=named):
        Augmentation(transform)


def test_windows_larger_than_the_image_are_refused():
    transform = transform_of("--input_size 48", train=False)
    transform.transforms[0].size = 47
    with pytest.raises(Unsupported, match="CenterCrop"):
        Augmentation(transform)


def test_interpolations_that_have_no_batched_form_are_named():
    transform = transform_of("--input_size 48")
    transform.transforms[0].interpolation = InterpolationMode.LANCZOS
    with pytest.raises(Unsupported, match="lanczos"):
        Augmentation(transform)
