"""Figure 5 and its numbers, the table of configurations, and CIFAR-100 as class folders."""

from pathlib import Path
from urllib.error import URLError

import matplotlib.image
import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from PIL import Image

import calibration_images
import cifar100_folders
import plot_attention
import print_configurations
from fabricate import cifar100, number_of
from helpers import words, written
from models.initialization import initialize
from weight_selection.cli import main as select_main
from weight_selection.sources.timm_models import create_model

LARGE = {"embed_dim": 64, "num_heads": 2, "depth": 2}
HALF = {"embed_dim": 32, "num_heads": 2, "depth": 2}


def attention(**kwargs):
    torch.manual_seed(0)
    return create_model("vit_tiny", **{**LARGE, **kwargs}).blocks[0].attn


# ---------------------------------------------------------------------------------------------------------
# The products and how diagonal they are


@pytest.mark.parametrize("head", [0, 1])
def test_products_are_those_of_the_head_element_by_element(head):
    layer = attention(embed_dim=12)
    query_key, value_proj = plot_attention.attention_products(layer, head)
    qkv, proj = layer.qkv.weight.tolist(), layer.proj.weight.tolist()
    own = range(6 * head, 6 * head + 6)
    for i in range(12):
        for j in range(12):
            assert query_key[i, j].item() == pytest.approx(sum(qkv[n][i] * qkv[12 + n][j] for n in own), abs=1e-7)
            assert value_proj[i, j].item() == pytest.approx(sum(qkv[24 + n][i] * proj[j][n] for n in own), abs=1e-7)


def test_products_give_the_output_of_attention():
    layer = attention(qkv_bias=False, proj_bias=False)
    tokens = torch.randn(5, 64)
    output = torch.zeros(5, 64)
    for head in range(2):
        query_key, value_proj = plot_attention.attention_products(layer, head)
        logits = tokens @ query_key @ tokens.T / layer.head_dim**0.5
        output += logits.softmax(dim=-1) @ tokens @ value_proj
    torch.testing.assert_close(layer(tokens[None])[0], output)


def test_diagonality_is_high_for_an_identity_and_nothing_for_noise():
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = plot_attention.diagonal_and_rest(3 * torch.eye(64) + noise)
    assert mean == pytest.approx(3, abs=0.5)
    assert std == pytest.approx(1, abs=0.05)
    assert plot_attention.diagonality(noise - 10 * torch.eye(64)) == pytest.approx(-10, abs=0.6)
    assert abs(plot_attention.diagonality(noise)) < 3 / 64**0.5


def test_only_the_block_with_equal_queries_and_keys_is_diagonal():
    torch.manual_seed(0)
    model = create_model("vit_tiny", **LARGE)
    with torch.no_grad():
        q, k, _ = model.blocks[1].attn.qkv.weight.view(3, 64, 64)
        k.copy_(q)
    first, second = (plot_attention.attention_products(block.attn, 0) for block in model.blocks)
    assert plot_attention.diagonality(second[0]) > 3
    assert all(abs(plot_attention.diagonality(product)) < 3 / 64**0.5 for product in (*first, second[1]))


# ---------------------------------------------------------------------------------------------------------
# plot_attention.py


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Directory of teacher.pth, a ViT whose products have diagonals, and of two selections of half its width."""
    directory = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    teacher = create_model("vit_tiny", **LARGE, num_classes=7)
    initialize(teacher, "mimetic")
    torch.save(teacher.state_dict(), directory / "teacher.pth")
    models = ["--pretrained_model", "vit_tiny", "--teacher_kwargs", *words(LARGE)]
    models += ["--student", "vit_tiny", "--student_kwargs", *words(HALF)]
    for rule in ("uniform", "random_inconsistent"):
        chosen = ["--pretrained_path", directory / "teacher.pth", "--element_selection", rule]
        select_main(list(map(str, [*models, *chosen, "--output_dir", directory / rule])))
    return directory


def panel(label, weights, kwargs, model="vit_tiny"):
    return ["--panel", label, model, weights, *words(kwargs)]


def test_figure_and_numbers_say_whether_diagonals_survive(files, tmp_path, cli, capsys):
    png = tmp_path / "figure.png"
    panels = [
        *panel("teacher", files / "teacher.pth", LARGE),
        *panel("selected", files / "uniform", HALF),
        *panel("inconsistent", files / "random_inconsistent" / "vit.pth", HALF),
        *panel("random", "timm", {**HALF, "depth": 1}),
    ]
    assert cli(plot_attention.main, "--output", png, *panels) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"figure: {png}"
    assert [line.split(":")[0] for line in lines if line.startswith("W_")] == ["W_q W_k^T", "W_v W_proj"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[0] == rows[4] == ["block", "teacher", "selected", "inconsistent", "random"]
    for sign, blocks in ((1, rows[2:4]), (-1, rows[6:8])):
        assert [block[0] for block in blocks] == ["0", "1"]
        assert blocks[1][-1] == "-"  # it has no second block
        for _, *cells in blocks:
            teacher, selected, *others = (sign * float(cell.split()[0]) for cell in cells if cell != "-")
            assert selected > 0.5 * teacher > 1
            assert all(abs(other) < 3 / 32**0.5 for other in others)
    whole = matplotlib.image.imread(png)
    assert whole.std() > 0.05
    assert cli(plot_attention.main, "--output", png, *panels, "--crop", 16) is None
    assert not np.array_equal(matplotlib.image.imread(png), whole)


def test_numbers_are_of_every_head(cli, tmp_path, capsys):
    command = ["--output", tmp_path / "x.png", "--seed", 3, *panel("mimetic", "mimetic", LARGE)]
    assert cli(plot_attention.main, *command) is None
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |"))
    layer = plot_attention.load_model("vit_tiny", "mimetic", LARGE, 3, "--panel").blocks[1].attn
    heads = sorted(plot_attention.diagonality(plot_attention.attention_products(layer, head)[0]) for head in range(2))
    assert row == f"| 1 | {sum(heads) / 2:.2f} ({heads[0]:.2f} to {heads[1]:.2f}) |"


def test_what_cannot_be_drawn_is_refused(files, tmp_path, cli):
    def refusal(*options, output="x.png"):
        message = cli(plot_attention.main, "--output", tmp_path / output, *options)
        assert written(tmp_path) == []
        return message

    assert "a ConvNeXt has no self-attention" in refusal(*panel("a", "timm", {}, model="convnext_femto"))
    assert "no such model; did you mean" in refusal(*panel("a", "timm", {}, model="vit_tny"))
    assert refusal(*panel("an a", tmp_path / "x.pth", LARGE)) == f"--panel 'an a' {tmp_path}/x.pth: no such file"
    assert "does not fit this model" in refusal(*panel("a", files / "uniform", LARGE))
    assert "name another or set its kwargs" in refusal(*panel("a", files / "teacher.pth", HALF))
    assert "write LABEL MODEL WEIGHTS" in refusal("--panel", "a", "vit_tiny")
    assert "--panel depth: write NAME=VALUE" in refusal("--panel", "a", "vit_tiny", "timm", "depth")
    assert "label of its own" in refusal(*panel("a", "timm", LARGE), *panel("a", "xavier", LARGE))
    assert "--crop 0: " in refusal(*panel("a", "timm", LARGE), "--crop", 0)
    assert "must end in one of" in refusal(*panel("a", "timm", LARGE), output="x.mp3")
    assert "cannot fetch its weights" in refusal(*panel("a", "pretrained", {}))


# ---------------------------------------------------------------------------------------------------------
# print_configurations.py


def test_configurations_are_those_of_the_models(capsys):
    print_configurations.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:6] == [
        "| depth | 12 | 2 / 2 / 6 / 2 | 12 | 3 / 3 / 9 / 3 |",
        "| embedding dimension | 192 | 48 / 96 / 192 / 384 | 384 | 96 / 192 / 384 / 768 |",
        "| number of heads | 3 | - | 6 | - |",
        "| number of parameters | 5,717,416 | 5,217,784 | 22,050,664 | 28,589,128 |",
    ]
    assert "ConvNeXt-F and ConvNeXt-T swapped" in lines[-1]


# ---------------------------------------------------------------------------------------------------------
# cifar100_folders.py

TRAIN = [(number, number * 7 % 100) for number in range(200)]  # two of each class
TEST = [(number, number % 100) for number in range(200, 256)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Directory of a small CIFAR-100 that counts as complete, without a network."""

    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5: Path(path).is_file())
    (tmp_path / "data").mkdir()
    cifar100(tmp_path / "data", TRAIN, TEST)
    return tmp_path / "data"


def folders(directory):
    """[(class, name of the file, number of the image)] below a directory."""
    return sorted(
        (path.parent.name, path.name, number_of(np.asarray(Image.open(path)).transpose(2, 0, 1)))
        for path in directory.glob("*/*")
    )


def expected(images, per_class):
    kept = {label: [number for number, its in images if its == label][:per_class] for label in range(100)}
    return sorted((f"class {label}", f"{n:03}.png", number) for label in kept for n, number in enumerate(kept[label]))


@pytest.mark.parametrize(("option", "per_class"), [((), 2), (("--train", 1), 1), (("--train", 2), 2)])
def test_the_first_images_of_each_class_train_and_all_test(data, tmp_path, cli, capsys, option, per_class):
    out = tmp_path / "folders"
    assert cli(cifar100_folders.main, data, out, *option) is None
    assert capsys.readouterr().out == f"{out}: {100 * per_class} training and 56 test images of 100 classes\n"
    assert folders(out / "train") == expected(TRAIN, per_class)
    assert folders(out / "val") == expected(TEST, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "folders"]
    assert out.stat().st_mode & 0o777 == (tmp_path / "data").stat().st_mode & 0o777  # for others to read


def test_only_some_classes(data, tmp_path, cli, capsys):
    out = tmp_path / "out"
    assert cli(cifar100_folders.main, data, out, "--classes", 7, 10) is None
    assert capsys.readouterr().out == f"{out}: 6 training and 3 test images of 3 classes\n"
    for part in ("train", "val"):
        assert sorted(path.name for path in (out / part).iterdir()) == ["class 7", "class 8", "class 9"]
    for wrong in ((5, 5), (-1, 3), (0, 101)):
        assert cli(cifar100_folders.main, data, tmp_path / "none", "--classes", *wrong).startswith("--classes ")


def test_folders_are_written_whole_or_not_at_all(data, tmp_path, cli, monkeypatch):
    out = tmp_path / "out"
    assert cli(cifar100_folders.main, data, out, "--train", 3) == "--train 3: a class has only 2 training images"
    assert "--train 0: " in cli(cifar100_folders.main, data, out, "--train", 0)
    assert "no such directory" in cli(cifar100_folders.main, tmp_path / "none", out)
    assert "OUT" in cli(cifar100_folders.main, data, data) and folders(data / "train") == []
    (tmp_path / "empty").mkdir()
    assert "cannot be downloaded" in cli(cifar100_folders.main, tmp_path / "empty", out)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    assert cli(cifar100_folders.main, data, out) == f"OUT {out}: cannot be written (No space left on device)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "empty"]


# ---------------------------------------------------------------------------------------------------------
# calibration_images.py


def test_calibration_images_are_a_draw_of_the_training_images(data, tmp_path, cli, capsys):
    out = tmp_path / "out"
    assert cli(calibration_images.main, "CIFAR100", data, out, "--count", 20) is None
    assert capsys.readouterr().out == f"{out}: 20 of 200 training images of CIFAR100\n"
    found = [(int(p.stem), number_of(np.asarray(Image.open(p)).transpose(2, 0, 1))) for p in out.iterdir()]
    assert len(found) == 20 and all(index == number for index, number in found)
    assert cli(calibration_images.main, "CIFAR100", data, tmp_path / "other", "--count", 20, "--seed", 1) is None
    assert {path.name for path in out.iterdir()} != {path.name for path in (tmp_path / "other").iterdir()}


def test_calibration_images_are_written_whole_or_not_at_all(data, tmp_path, cli, monkeypatch):
    out = tmp_path / "out"
    assert (
        cli(calibration_images.main, "CIFAR100", data, data)
        == f"OUT {data}: exists; remove it or name another directory"
    )
    assert cli(calibration_images.main, "CIFAR100", data, out) == "--count 256: give a number from 1 to 200"
    assert "no such directory" in cli(calibration_images.main, "CIFAR100", tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    assert "cannot read CIFAR100" in cli(calibration_images.main, "CIFAR100", tmp_path / "empty", out)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    said = cli(calibration_images.main, "CIFAR100", data, out, "--count", 2)
    assert said == f"OUT {out}: cannot be written (No space left on device)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "empty"]
