"""Calibration images, and the command line of projection."""

import json
import shutil
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ablate_projection
from architectures import lively, models
from helpers import assert_same, differ, images_for, meta, words
from traces import structure_of
from weight_selection import select_weights
from weight_selection.cli import main as select_main
from weight_selection.errors import InputError
from weight_selection.projection.activation_tap import ActivationTap
from weight_selection.projection.images import Calibration, noise
from weight_selection.projection.traced_model import TracedModel
from weight_selection.sources.teachers import normalization
from weight_selection.sources.timm_models import create_model

CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}


def test_calibration_images_are_the_same_every_time_and_others_for_another_seed(image_folder):
    for source in ("noise", image_folder):
        batches = Calibration(source, 40, None, (3, 16, 16), CONFIG, 0)
        first, again = torch.cat(list(batches)), torch.cat(list(batches))
        assert first.shape == (40, 3, 16, 16) and torch.equal(first, again) and len(list(batches)) == len(batches)
        assert not torch.equal(first, torch.cat(list(Calibration(source, 40, None, (3, 16, 16), CONFIG, 1))))
        (larger,) = Calibration(source, 3, 24, (3, 16, 16), CONFIG, 0)
        assert larger.shape == (3, 3, 24, 24)
    assert len(first.flatten(1).unique(dim=0)) == 40, "an image twice"


def test_the_digest_is_that_of_what_is_in_the_drawn_files_wherever_they_are(image_folder, tmp_path):
    def digest(source, count=None, seed=0):
        return Calibration(source, count, None, (3, 16, 16), CONFIG, seed).sha256

    copied = shutil.copytree(image_folder, tmp_path / "copied")
    assert digest(copied) == digest(image_folder) != digest(image_folder, 40)
    assert digest(image_folder, 40) == digest(copied, 40) != digest(image_folder, 40, seed=1)
    first, second = sorted(copied.rglob("*.png"))[:2]
    first.write_bytes(second.read_bytes())
    assert digest(copied) != digest(image_folder)
    assert digest("noise") is None


def test_noise_is_one_over_f_in_channels_that_are_alike():
    images = torch.stack([noise((3, 64, 64), seed) for seed in range(64)]).double()
    assert images.min() >= 0 and images.max() <= 1 and abs(images.mean() - 0.5) < 0.05
    amplitude = torch.fft.rfft2(images).abs().square().mean((0, 1))[0].sqrt()
    torch.testing.assert_close(amplitude[2] / amplitude[8], torch.tensor(4.0, dtype=torch.float64), rtol=0.2, atol=0)
    light = images - images.mean((2, 3), keepdim=True)
    red, green = light[:, 0].flatten(), light[:, 1].flatten()
    assert 0.6 < torch.corrcoef(torch.stack([red, green]))[0, 1] < 0.9
    (batch,) = Calibration("noise", 2, None, (3, 64, 64), CONFIG | {"std": (0.25,) * 3}, 0)
    assert batch.std() > 2 * images.std(), "not normalised as the teacher's images are"


def test_a_tap_shows_layers_and_takes_what_is_given_back():
    model = lively(create_model("test_vit", num_classes=7))
    images, traced = images_for(model, 2), TracedModel.of(model, structure_of(model, "model"))
    seen = []
    with (
        torch.no_grad(),
        ActivationTap(traced, lambda key, x, y: seen.append(key) or (y * 0 if key == "head.weight" else y)),
    ):
        assert not model(images).any()
    assert seen[0] == "patch_embed.proj.weight" and seen[-1] == "head.weight" and len(seen) == 2 + 4 * 6


class NormByName(torch.nn.Module):
    """An RMS norm that gets what it takes as a keyword argument."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Linear(12, 8), torch.nn.RMSNorm(8)

    def forward(self, images):
        return self.norm(x=self.first(images.flatten(1)))


def test_a_tap_shows_a_norm_that_is_called_by_name():
    model, images, seen = NormByName(), torch.randn(2, 3, 2, 2), []
    traced = TracedModel.of(model, structure_of(model, "model", images))
    with torch.no_grad(), ActivationTap(traced, lambda key, x, y: y, lambda key, x, y: seen.append((key, x)) or y):
        model(images)
        ((key, taken),) = seen
        assert key == "norm.weight" and torch.equal(taken, model.first(images.flatten(1)))


LARGE = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 16, "patch_size": 4, "num_classes": 5}
SMALL = {**LARGE, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def command(tmp_path_factory, image_folder):
    """Words of the command line: a small teacher's file, a student of half its width, images; later words win."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(create_model("vit_small", **LARGE).state_dict(), path)
    given = ["--pretrained_model", "vit_small", "--pretrained_path", path, "--student", "vit_tiny"]
    for option, sizes in (("--teacher_kwargs", LARGE), ("--student_kwargs", SMALL)):
        given += [option, *(f"{key}={value}" for key, value in sizes.items())]

    def words(output, *more):
        return [*given, "--output_dir", output, "--calibration", image_folder, "--calibration_images", 20, *more]

    return words


def test_a_teachers_file_may_be_of_other_images_than_the_student(cli, command, tmp_path):
    larger = [f"{key}={value}" for key, value in {**SMALL, "img_size": 24}.items()]
    more = ["--element_selection", "project", "--calibration", "noise", "--student_kwargs", *larger]
    assert cli(select_main, *command(tmp_path / "init.pth", *more)) is None
    teacher, student = create_model("vit_small", **LARGE), create_model("vit_tiny", **{**SMALL, "img_size": 24})
    teacher.load_state_dict(torch.load(command("")[3], weights_only=True))
    expected = select_weights(teacher, student, element_selection="project", calibration="noise", calibration_images=20)
    assert_same(torch.load(tmp_path / "init.pth", weights_only=True), expected)
    assert teacher.pos_embed.shape[1] == 17, "the caller's model is left as it is"


@pytest.mark.parametrize("method", ["project", "greedy"])
def test_the_command_writes_what_the_function_gives_with_where_it_is_from(cli, command, method, tmp_path, image_folder):
    options = ["--element_selection", method, "--seed", 3]
    assert cli(select_main, *command(tmp_path / "init.pth", *options)) is None
    assert cli(select_main, *command(tmp_path / "again.pth", *options)) is None
    written, again = (torch.load(tmp_path / name, weights_only=True) for name in ("init.pth", "again.pth"))
    teacher = create_model("vit_small", **LARGE)
    function = select_weights(
        teacher,
        create_model("vit_tiny", **SMALL),
        weights=command("")[3],
        element_selection=method,
        calibration=image_folder,
        calibration_images=20,
        seed=3,
    )
    student = create_model("vit_tiny", **SMALL)
    assert list(written) == [key for key in student.state_dict() if not key.startswith("head")]
    for other in (again, function):
        assert all(torch.equal(written[key], other[key]) for key in written)
    options = json.loads((tmp_path / "init.json").read_text())["options"]
    assert options["calibration_device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert options["element_selection"] == method and options["seed"] == 3
    assert (options["calibration"], options["calibration_images"]) == (str(image_folder), 20)
    assert options["calibration_size"] == [16, 16]
    assert options["calibration_sha256"] == Calibration(image_folder, 20, None, (3, 16, 16), CONFIG, 3).sha256


RESNET = {"stem_width": (8, 4), "channels": ((16, 24, 32, 48), (8, 12, 16, 24))}


def test_a_model_of_any_size_sees_images_as_its_configuration_says(cli, tmp_path):
    """A ResNet has no size of its own; calibrated with others than those of its training, it would see other things."""
    large, small = ({key: values[which] for key, values in RESNET.items()} for which in range(2))
    config = "".join(f"  {key}: {value}\n" for key, value in small.items())
    (tmp_path / "student.yaml").write_text(f"model: resnet18d\ninput_size: 32\nmodel_kwargs:\n{config}")
    torch.manual_seed(0)
    teacher = create_model("resnet18d", **large)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    command = ["--pretrained_model", "resnet18d", "--pretrained_path", tmp_path / "teacher.pth", "--teacher_kwargs"]
    command += [*words(large), "--element_selection", "greedy", "--calibration", "noise", "--calibration_images", 4]
    student = {"config": ["--student_config", tmp_path / "student.yaml"]}
    student["named"] = ["--student", "resnet18d", "--student_kwargs", *words(small), "--calibration_size", 32]
    student["larger"] = [*student["config"], "--calibration_size", 64]
    given = {}
    for name, options in student.items():
        assert cli(select_main, *command, *options, "--output_dir", tmp_path / f"{name}.pth") is None
        given[name] = torch.load(tmp_path / f"{name}.pth", weights_only=True)
    side = json.loads((tmp_path / "config.json").read_text())["options"]["calibration_size"]
    images = torch.cat(list(Calibration("noise", 4, None, (3, 32, 32), teacher.pretrained_cfg, 0)))
    greedy = partial(select_weights, teacher, element_selection="greedy")
    function = greedy(create_model("resnet18d", **small), calibration=images)
    built = create_model("resnet18d", input_size=32, **small)
    assert side == [32, 32]
    assert_same(given["config"], given["named"])
    assert_same(given["config"], function)
    assert_same(given["config"], greedy(built, calibration="noise", calibration_images=4))
    assert differ(given["config"], given["larger"])


@pytest.mark.parametrize("imagenet", [True, False])
def test_images_are_normalised_as_a_checkpoint_of_main_says_that_it_was_trained(cli, command, imagenet, tmp_path):
    """timm's ViT-S has 0.5; main.py trains with ImageNet's mean or that, and its checkpoint says which."""
    weights = torch.load(command("")[3], weights_only=True)
    checkpoint = tmp_path / "checkpoint.pth"
    torch.save({"model": weights, "args": {"imagenet_default_mean_and_std": imagenet}}, checkpoint)
    options = ["--element_selection", "project", "--pretrained_path", checkpoint, "--calibration", "noise"]
    assert cli(select_main, *command(tmp_path / "init.pth", *options)) is None
    written = torch.load(tmp_path / "init.pth", weights_only=True)
    mean, std = normalization(imagenet)
    images = torch.cat(list(Calibration("noise", 20, None, (3, 16, 16), {"mean": mean, "std": std}, 0)))
    teacher, student = create_model("vit_small", **LARGE), create_model("vit_tiny", **SMALL)
    project = partial(select_weights, teacher, student, element_selection="project")
    assert_same(written, project(weights=checkpoint, calibration="noise", calibration_images=20))
    assert_same(written, project(weights=weights, calibration=images))


METHODS = {part: "greedy" if part in ("coordinates", "weights") else "project" for part in ablate_projection.PARTS}


@pytest.fixture(scope="module")
def ablated(command, tmp_path_factory):
    """{name: weights}: of both methods whole and, after all parts have been taken out, again; without each part."""
    directory = tmp_path_factory.mktemp("ablated")

    def run(program, *first, name, method):
        program([str(word) for word in [*first, *command(directory / f"{name}.pth", "--element_selection", method)]])
        return torch.load(directory / f"{name}.pth", weights_only=True)

    whole = {method: run(select_main, name=method, method=method) for method in ("project", "greedy")}
    without = {part: run(ablate_projection.main, part, name=part, method=METHODS[part]) for part in METHODS}
    return (
        whole
        | without
        | {f"{method}, again": run(select_main, name="again_" + method, method=method) for method in whole}
    )


@pytest.mark.parametrize("part", ablate_projection.PARTS)
def test_without_a_part_other_weights_come_out_and_afterwards_the_same_as_ever(ablated, part):
    whole, without, again = (ablated[name] for name in (METHODS[part], part, f"{METHODS[part]}, again"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    changed = [key for key in whole if not torch.allclose(whole[key], without[key], atol=1e-6)]
    assert {"blocks.1.mlp.fc1.weight", "blocks.1.attn.qkv.weight"} & set(changed)
    assert ("cls_token" in changed) == (part in ("weights", "frame", "coordinates"))


def test_a_dry_run_says_what_is_done_and_needs_no_images(cli, command, tmp_path, capsys):
    words = [str(word) for word in command(tmp_path, "--element_selection", "project", "--dry_run", "--verbose")]
    without = words[: words.index("--calibration")] + words[words.index("--calibration_images") + 2 :]
    assert cli(select_main, *without) is None
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["blocks.0.attn.qkv.weight"].endswith("heads, least-squares up map")
    assert lines["blocks.0.mlp.fc2.weight"].endswith("rotated, least-squares up map")
    assert lines["blocks.0.mlp.fc1.bias"].endswith("strongest")
    assert lines["cls_token"].endswith("rotated") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--element_selection", "uniform"], "--calibration {images}: has no effect with --element_selection uniform"),
        (["--calibration", "nowhere"], "--calibration nowhere: no such directory; name one of images, or noise"),
        (["--calibration_images", 0], "--calibration_images 0: give a number from 1 up"),
        (["--calibration_images", 999], "--calibration {images}: 61 images there, --calibration_images asks for 999"),
        (["--calibration_size", 0], "--calibration_size 0: give a number of pixels from 1 up"),
        (["--calibration_size", 24], "calibration: the student cannot take 24 x 24 pixels"),
        (["--exclude", "mlp"], "--exclude mlp: project fits layers to what those before them give"),
        (
            ["--student", "resnet18", "--student_kwargs", "--pretrained_model", "resnet18", "--teacher_kwargs"],
            "--element_selection project: resnet18 has no residual stream that can be rotated: no layer",
        ),
        (
            ["--student_kwargs", *(f"{k}={v}" for k, v in (SMALL | {"num_heads": 1}).items())],
            "blocks.0.attn: the teacher's heads have 8 dimensions, the student's 16: heads cannot be merged",
        ),
        (
            ["--student_kwargs", *(f"{k}={v}" for k, v in (SMALL | {"in_chans": 1}).items())],
            "--calibration {images}: images are RGB, the model takes 1 channels; use noise",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(cli, command, more, message, tmp_path, image_folder):
    said = cli(select_main, *command(tmp_path / "out", "--element_selection", "project", *more))
    assert said.startswith(message.format(images=image_folder)), said
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_projection_asks_for_images(cli, command, tmp_path):
    words = [str(word) for word in command(tmp_path, "--element_selection", "greedy")]
    words = words[: words.index("--calibration")] + words[words.index("--calibration_images") + 2 :]
    assert cli(select_main, *words).startswith("--calibration is missing: --element_selection greedy needs")
    with pytest.raises(
        InputError, match="calibration is missing: element_selection=greedy needs a directory of images"
    ):
        select_weights(*models("vit"), element_selection="greedy")
    with pytest.raises(InputError, match="exclude=mlp: greedy fits layers"):
        select_weights(*models("vit"), element_selection="greedy", calibration="noise", exclude=["mlp"])
    with pytest.raises(InputError, match="element_selection=projekt: choose one of uniform"):
        select_weights(*models("vit"), element_selection="projekt", calibration="noise")
    with pytest.raises(InputError, match="calibration=noise: has no effect with element_selection=uniform"):
        select_weights(*models("vit"), calibration="noise")
    with pytest.raises(InputError, match="calibration_size=32: has no effect with images given as tensors"):
        select_weights(*models("vit"), element_selection="greedy", calibration=torch.zeros(1), calibration_size=32)
    with pytest.raises(InputError, match="student: is on the meta device, but projection runs it"):
        select_weights(models("vit")[0], meta("vit_tiny"), element_selection="greedy", calibration="noise")


def test_without_a_count_all_images_of_a_small_directory_are_taken(cli, command, tmp_path):
    words = [str(word) for word in command(tmp_path / "out.pth", "--element_selection", "greedy")]
    at = words.index("--calibration_images")
    assert cli(select_main, *words[:at], *words[at + 2 :]) is None
    assert json.loads((tmp_path / "out.json").read_text())["options"]["calibration_images"] == 61
    (tmp_path / "empty").mkdir()
    said = cli(select_main, *words, "--calibration", tmp_path / "empty")
    assert said.startswith(f"--calibration {tmp_path / 'empty'}: no images there")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 1, 32, 32), "images have 1 channels, the model takes 3"),
        (
            torch.zeros(3, 32, 32),
            r"batches must be floating point \(n, 3, height, width\), not torch.float32 \(3, 32, 32\)",
        ),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "not torch.uint8"),
        ([(torch.zeros(4, 3, 32, 32), 0)], "not tuple"),
        ([], "holds no batches; give some"),
        (torch.zeros(4, 3, 20, 20), "the student cannot take 20 x 20 pixels"),
        (iter([torch.zeros(4, 3, 32, 32)]), "a list_iterator cannot be gone through three times; give a list"),
    ],
)
def test_images_of_a_callers_own_are_checked(images, message):
    with pytest.raises(InputError, match=message):
        select_weights(*models("vit"), element_selection="greedy", calibration=images)


class ByName(torch.nn.Module):
    """Two convolutions; the images are called pixel_values."""

    def __init__(self, width):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, width, 3), torch.nn.Conv2d(width, 4, 3)

    def forward(self, pixel_values, labels=None):
        return self.last(self.first(pixel_values).relu())


def test_batches_are_taken_as_loaders_give_them():
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12)
    teacher, student = ByName(8), ByName(4)
    greedy = partial(select_weights, teacher, student, element_selection="greedy", example_inputs=images[:1])
    expected = greedy(calibration=images.split(4))
    pairs = list(zip(images.split(4), labels.split(4), strict=True))
    named = [{"pixel_values": x, "labels": y, "text": ["a"] * 4} for x, y in pairs]
    for batches in (
        DataLoader(TensorDataset(images), 4),
        DataLoader(TensorDataset(images, labels), 4),
        [(x, y, ["path"] * 4) for x, y in pairs],
        named,
        [(batch, batch["labels"]) for batch in named],
    ):
        assert_same(greedy(calibration=batches), expected)
    with pytest.raises(InputError, match="batches must be tensors, pairs of inputs and labels, .* not dict"):
        greedy(calibration=[{"text": ["a"]}])


class Sum(torch.nn.Module):
    """It takes two tensors."""

    def __init__(self, width):
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, width), torch.nn.Linear(width, 3)

    def forward(self, x, y):
        return self.last(self.first(x + y))


def test_several_inputs_are_given_by_name():
    x = torch.randn(16, 6)
    greedy = partial(select_weights, Sum(8), Sum(4), element_selection="greedy", example_inputs=(x[:1], x[:1]))
    with pytest.raises(
        InputError, match=r"more than a tensor like \(16, 6\); give .* names of its forward's arguments"
    ):
        greedy(calibration=x)
    assert "last.weight" in greedy(calibration=[{"x": x, "y": x}])


@pytest.mark.parametrize("first", [partial(torch.nn.Embedding, 9), partial(torch.nn.Linear, 4)])
def test_an_input_needs_no_name_where_the_model_takes_nothing_else(first):
    ids = torch.randint(0, 9, (16, 4))
    inputs = ids if first.func is torch.nn.Embedding else ids.float()
    layers = [torch.nn.Sequential(first(width), torch.nn.Linear(width, 3)) for width in (8, 4)]
    greedy = partial(select_weights, *layers, element_selection="greedy", example_inputs=inputs[:1])
    expected = greedy(calibration=[{"input": inputs}])
    for batches in ([inputs], [(inputs, torch.arange(16))], inputs):
        assert_same(greedy(calibration=batches), expected)
    if inputs is ids:
        with pytest.raises(
            InputError, match=r"the student cannot take batches of \(16, 4\); give what its forward takes"
        ):
            greedy(calibration=ids + 9)


def test_an_image_that_cannot_be_read_is_named(cli, command, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    more = ["--element_selection", "greedy", "--calibration", tmp_path / "images", "--calibration_images", 1]
    said = cli(select_main, *command(tmp_path / "out.pth", *more))
    assert "broken.png cannot be read" in said and not (tmp_path / "out.pth").exists()
