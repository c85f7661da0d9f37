"""Shared by several test files: small real data, the options of a run that takes a second, a program as a call.

The process of pytest-xdist that only hands out the tests reads this file too, so it imports torch inside its functions.
"""

import functools
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when timm is imported; a test that needs the network fails at once

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

import main
from weight_selection.errors import InputError

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("repeatable")

# Class folders, each around one colour: learnt in a few epochs, but not in the first. Test images are an odd number,
# so that two processes cannot share them evenly.
COLOURS = {"blue": (40, 60, 200), "green": (60, 190, 70), "red": (200, 50, 50)}


# --quick leaves out tests that use one of these fixtures or modules, or are marked as slow; of a test that runs on many
# cases it takes the first.
TRAINING_FIXTURES = {"train", "interrupted", "tiny_run"}
PROCESS_MODULES = ("subprocess", "processes", "start_together")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also every pair of timm's models, which takes most of an hour")
    parser.addoption(
        "--quick", action="store_true", help="one case of each test that does not train or start processes"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; left out by --quick")
    config.left_out = 0


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The test files import the libraries. The garbage collector need not look through their half million objects.

    Afterwards it looks less often than it does by default: the tests build thousands of small models.
    """
    gc.disable()
    result = yield
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()
    return result


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    quick = {item.nodeid.partition("[")[0]: item for item in reversed(items) if not is_slow(item)}
    config.left_out = len(items) - len(quick)
    items[:] = [item for item in items if item in set(quick.values())]
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist, which the one that reports reads
        config.workeroutput["left_out"] = config.left_out


def is_slow(item):
    starts_processes = any(hasattr(item.module, name) for name in PROCESS_MODULES)
    return starts_processes or item.get_closest_marker("slow") or TRAINING_FIXTURES & set(item.fixturenames)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.left_out = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--quick"):
        terminalreporter.write_line(f"--quick left out {config.left_out} tests; all must pass: bash scripts/test.sh")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tests' models are so small that threads cost more than they bring; on a busy machine, twenty times more."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def lock_of_progress_bars():
    """One for each process. tqdm's own is shared with forks, and stays locked when a test kills one while it prints."""
    import threading

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """No test cuts the power, so none has to wait until a disk holds what it writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Directory of train/CLASS/IMAGE.png (48 images) and val/CLASS/IMAGE.png (13), three classes. Copy it to change."""
    from helpers import TEST_IMAGES, TRAIN_IMAGES

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, images in (("train", TRAIN_IMAGES), ("val", TEST_IMAGES)):
        for number in range(images):
            name, colour = list(COLOURS.items())[number % len(COLOURS)]
            pixels = np.array(colour) + rng.normal(0, 50, 3) + rng.normal(0, 30, (20, 20, 3))
            (root / part / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def tiny_run(image_folder):
    """Options of main.py for two epochs of three steps of a very small ViT; options that follow them win."""
    model = "--model vit_tiny --model_kwargs embed_dim=32 depth=2 num_heads=2 patch_size=4 --input_size 16"
    run = "--epochs 2 --warmup_steps 0 --batch_size 16 --lr 1e-3 --num_workers 0 --device cpu"
    return f"--data_set image_folder {model} {run}".split() + ["--data_path", str(image_folder)]


@pytest.fixture(scope="session")
def train(tiny_run):
    """Run main.py with further options, given as words in strings or as paths."""

    def run(*options):
        main.main([*tiny_run, *(word for option in options for word in str(option).split())])

    return run


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupted(train, monkeypatch):
    """Run main.py with further options until it would begin ``epoch``."""
    import training.run

    def run(epoch, *options):
        train_one_epoch = training.run.train_one_epoch

        def until(state, loader, metrics):
            if metrics.epoch == epoch:
                raise Interrupted
            return train_one_epoch(state, loader, metrics)

        with monkeypatch.context() as patch:
            patch.setattr(training.run, "train_one_epoch", until)
            with pytest.raises(Interrupted):
                train(*options)

    return run


@pytest.fixture
def at_call(monkeypatch):
    """``at_call(owner, name, number, action)``: do something at that call of a function, counted from 1."""

    def prepare(owner, name, number, action):
        function, calls = getattr(owner, name), []

        @functools.wraps(function)
        def counted(*args, **kwargs):
            calls.append(None)
            if len(calls) == number:
                action()
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
        return calls

    return prepare


@pytest.fixture
def cli():
    """``cli(main, *words)`` runs a program in this process: None, or its message if it refuses what it was given."""

    def run(main, *words):
        try:
            main([str(word) for word in words])
        except InputError as error:
            message = str(error)
            assert "\n" not in message, message
            return message
        return None

    return run
