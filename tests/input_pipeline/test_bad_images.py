"""Images that cannot be read, and images of every kind that can."""

import io
import os
import re
import shutil
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageDataset

import engine
from bench_faults import differences
from datasets import ImageFiles
from distributed.program import RunError, Stopped
from helpers import read_log, read_results
from processes import start_together
from weight_selection.errors import InputError
from weight_selection.image_files import BadImage


@pytest.fixture
def data(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(image_folder, tmp_path / "data")


def damage(path, how="truncated"):
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "no image": b"not an image"}[how])


# ---------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("how", ["truncated", "empty", "no image"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_image_that_cannot_be_read_stops_the_run_and_is_named(train, data, how, workers):
    path = data / "train" / "green" / "1.png"
    damage(path, how)
    with pytest.raises(RunError, match=f"training image {path} cannot be read .*; repair it, or .*--skip_bad_images N"):
        train(f"--data_path {data} --num_workers {workers} --output_dir run")
    assert not list(Path("run").glob("*.pth"))


def test_bad_images_are_replaced_and_listed_alike_by_any_number_of_workers(train, data, capsys):
    paths = [data / "train" / name for name in ("green/1.png", "green/4.png", "red/47.png")]
    for path in paths:
        damage(path)
    for workers in (0, 2):
        train(f"--data_path {data} --skip_bad_images 3 --num_workers {workers} --output_dir run")
        output = capsys.readouterr().out
        for path in paths:
            assert len(re.findall(f"warning: {path} cannot be read .*; replaced by another", output)) == 1
        Path("run").rename(f"run-{workers}")
    assert [line.split()[0] for line in read_results(Path("run-0"))["bad_images"]] == sorted(map(str, paths))
    assert [what for what in differences(Path("run-0"), Path("run-2")) if "num_workers" not in what] == []


def test_one_bad_image_more_than_allowed_stops_the_run(train, data):
    for name in ("green/1.png", "green/4.png", "red/47.png"):
        damage(data / "train" / name)
    with pytest.raises(RunError, match=r"training image \S+ cannot be read .* \(3 of them\); repair it"):
        train(f"--data_path {data} --skip_bad_images 2 --output_dir run")


def test_bad_images_found_before_an_interruption_still_count(train, data, monkeypatch):
    for name in ("green/1.png", "red/47.png"):
        damage(data / "train" / name)
    update = engine.TrainState.update

    def stop(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self)

    options = f"--data_path {data} --skip_bad_images 2 --batch_size 8 --epochs 2 --output_dir run"
    train(options)
    Path("run").rename("whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(engine.TrainState, "update", stop)
        train(options)
    train(options)
    assert differences(Path("run"), Path("whole")) == []


def test_two_processes_share_what_they_could_not_read(tiny_run, data, tmp_path):
    for name in ("green/1.png", "green/4.png", "red/47.png"):
        damage(data / "train" / name)
    options = [*tiny_run, *f"--data_path {data} --batch_size 8 --output_dir run --skip_bad_images".split()]
    few = start_together(2, [*options, "2"], tmp_path)
    assert few.wait() == [1, 1]
    assert few.printed(0, "err").startswith(f"main.py: error: training image {data}/train/green/1.png cannot be read")
    assert len(few.printed(0, "err").splitlines()) == 1
    assert few.printed(1, "err") == ""
    assert start_together(2, [*options, "3"], tmp_path).wait() == [0, 0]
    assert len(read_results(Path("run"))["bad_images"]) == 3


def test_bad_test_image_stops_the_run_which_goes_on_when_it_is_repaired(train, data):
    path = data / "val" / "green" / "1.png"
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(RunError, match=f"test image {path} cannot be read"):
        train(f"--data_path {data} --skip_bad_images 5 --output_dir run")
    assert [path.name for path in Path("run").glob("*.pth")] == ["checkpoint-0-step-3.pth"], "the epoch is not lost"
    path.write_bytes(whole)
    train(f"--data_path {data} --skip_bad_images 5 --output_dir run")
    assert [row["epoch"] for row in read_log(Path("run"))] == [0, 1]


def test_as_many_bad_images_as_there_are_images_are_too_many(train, data):
    with pytest.raises(InputError, match="--skip_bad_images 48: there are only 48 training images"):
        train(f"--data_path {data} --skip_bad_images 48")


# ---------------------------------------------------------------------------------------------------------
# Kinds of images

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
COLOUR = Image.fromarray(PIXELS)


def _with(image, suffix, **options):
    return lambda path: image.save(path.with_suffix(suffix), **options)


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


KINDS = {
    "colour": _with(COLOUR, ".png"),
    "gray": _with(COLOUR.convert("L"), ".png"),
    "gray with alpha": _with(COLOUR.convert("LA"), ".png"),
    "one bit": _with(COLOUR.convert("1"), ".png"),
    "palette": _with(COLOUR.convert("P"), ".png"),
    "palette with transparency": _with(COLOUR.convert("P"), ".png", transparency=3),
    "alpha": _with(COLOUR.convert("RGBA"), ".png"),
    "16 bits": _with(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 200), ".png"),
    "CMYK": _with(COLOUR.convert("CMYK"), ".jpg"),
    "rotated by EXIF": _with(COLOUR, ".jpg", exif=_exif(6)),
    "mirrored by EXIF": _with(COLOUR, ".jpg", exif=_exif(2)),
    "TIFF": _with(COLOUR, ".png", format="TIFF"),
    "WebP": _with(COLOUR, ".png", format="WEBP", lossless=True),
    "BMP": _with(COLOUR, ".png", format="BMP"),
    "animation": _with(COLOUR, ".png", format="WEBP", save_all=True, append_images=[COLOUR.rotate(90)]),
    "PNG called JPEG": lambda path: COLOUR.save(path.with_suffix(".jpg"), format="PNG"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", KINDS)
def test_image_of_every_kind_is_what_timm_reads(tmp_path, kind):
    (tmp_path / "class").mkdir()
    KINDS[kind](tmp_path / "class" / "image")
    (path,) = (tmp_path / "class").iterdir()
    ours, label = ImageFiles([(path, 7)], np.asarray)[0]
    theirs, _ = ImageDataset(str(tmp_path), transform=np.asarray)[0]
    assert label == 7
    assert ours.shape == (24, 16, 3)
    assert np.array_equal(ours, theirs)


def read_bytes(path, content):
    path.write_bytes(content)
    return ImageFiles([(path, 0)], np.asarray)[0]


def test_postscript_that_is_called_an_image_is_not_run(tmp_path):
    with pytest.raises(BadImage, match="image.jpg cannot be read"):
        read_bytes(
            tmp_path / "image.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
        )


def test_header_of_a_huge_image_takes_no_memory(tmp_path):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 1_000_000, 1_000_000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(BadImage, match="decompression bomb"):
        read_bytes(tmp_path / "image.png", png)


def _saved(image, kind, **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


FILES = [
    _saved(COLOUR, "PNG"),
    _saved(COLOUR, "JPEG"),
    _saved(COLOUR, "TIFF"),
    _saved(COLOUR, "WEBP"),
    _saved(COLOUR, "BMP"),
]
FILES += [_saved(COLOUR.convert("P"), "GIF"), _saved(COLOUR, "PPM"), _saved(COLOUR, "JPEG", progressive=True)]


@pytest.mark.filterwarnings("ignore")
@given(st.data())
def test_mutated_image_is_read_or_refused(tmp_path_factory, data):
    content = bytearray(data.draw(st.sampled_from(FILES)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    try:
        pixels, _ = read_bytes(tmp_path_factory.getbasetemp() / "mutated.png", bytes(content))
    except BadImage:
        return
    assert pixels.ndim == 3
