"""What a run says of itself as it goes: the columns of log.txt, TensorBoard's tags and pictures, Weights & Biases."""

import importlib.machinery
import io
import shlex
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import engine
import main
from helpers import read_checkpoint, read_log, read_results, words
from training.metric_log import WANDB_RUN, MetricLog
from training.options import default_options, parse_args
from weight_selection.errors import InputError
from weight_selection.sources.timm_models import create_model

UNMIXED = "--mixup 0 --cutmix 0"


class Killed(Exception):
    pass


def scalars(board, tag):
    return [(event.step, event.value) for event in EventAccumulator(str(board)).Reload().Scalars(tag)]


@pytest.mark.parametrize("distillation", ["none", "feature"])
def test_class_acc_is_the_share_of_training_images_that_are_right(train, image_folder, tmp_path, distillation):
    """At a learning rate of 0, and without randomness in the images, it is the accuracy of an evaluation on them."""
    same_images = f"--aa none --color_jitter 0 --reprob 0 --hflip 0 --scale 1 1 --crop_pct 1 {UNMIXED}"
    folders = f"--data_path {image_folder}/train --eval_data_path {image_folder}/train"
    if distillation != "none":
        size = {"embed_dim": 16, "depth": 1, "num_heads": 1, "patch_size": 4}
        torch.save(create_model("vit_tiny", img_size=16, **size).state_dict(), tmp_path / "teacher.pth")
        same_images += (
            f" --teacher vit_tiny --teacher_path {tmp_path}/teacher.pth --teacher_kwargs {' '.join(words(size))}"
        )
    same_images += f" --distillation {distillation}"
    train(
        f"{same_images} {folders} --epochs 1 --lr 0 --min_lr 0 --batch_size 8 --update_freq 2 --output_dir {tmp_path}"
    )
    (row,) = read_log(tmp_path)
    assert 0 < row["train_class_acc"] < 1
    assert 100 * row["train_class_acc"] == pytest.approx(row["test_acc1"])


def test_run_killed_within_an_epoch_leaves_the_log_and_the_curves_of_a_whole_one(train, tmp_path, at_call, monkeypatch):
    options = f"{UNMIXED} --epochs 2 --layer_decay 0.5 --save_ckpt_steps 1 --log_dir"

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine, "SYNCHRONIZE_INTERVAL", 1)  # a point on the curves for each step
        train(options, tmp_path / "board", "--output_dir", tmp_path / "whole")
        at_call(engine.TrainState, "update", 6, kill)  # the last step of the second epoch
        with pytest.raises(Killed):
            train(options, tmp_path / "parts", "--output_dir", tmp_path / "run")
        (tmp_path / "run" / "checkpoint-1-step-2.pth").unlink()  # its last step is done again
        train(options, tmp_path / "parts", "--output_dir", tmp_path / "run")
    rows = read_log(tmp_path / "run")
    assert rows == read_log(tmp_path / "whole")
    for row in rows:
        assert row["train_min_lr"] == pytest.approx(row["train_lr"] * 0.5**3), "patch embedding, two blocks, head"
    for tag in ("loss/loss", "loss/class_acc", "opt/min_lr", "opt/grad_norm"):
        assert scalars(tmp_path / "parts", tag) == scalars(tmp_path / "board", tag)
        assert [step for step, _ in scalars(tmp_path / "parts", tag)] == [0, 1, 2, 3, 4, 5]
    accuracy = [value for _, value in scalars(tmp_path / "board", "loss/class_acc")]
    assert [sum(accuracy[:3]) / 3, sum(accuracy[3:]) / 3] == pytest.approx([row["train_class_acc"] for row in rows])


def test_checkpoint_within_an_epoch_of_the_version_before_goes_on(train, tmp_path, at_call):
    """It has no sum of class_acc, so that the log of its epoch has none."""

    def kill():
        raise Killed

    options = f"{UNMIXED} --save_ckpt_steps 2 --output_dir {tmp_path}"
    at_call(engine.TrainState, "update", 3, kill)
    with pytest.raises(Killed):
        train(options)
    content = read_checkpoint(tmp_path, "0-step-2")
    assert content["partial"].pop("class_acc") > 0
    torch.save(content, tmp_path / "checkpoint-0-step-2.pth")
    train(options)
    first, second = read_log(tmp_path)
    assert second.keys() - first.keys() == {"train_class_acc"}
    assert first["train_loss"] > 0


def test_tensorboard_shows_the_images_that_the_first_step_sees_and_the_options(train, tmp_path, monkeypatch):
    seen = []
    backward = engine.TrainState.backward

    def watched(state, images, targets, exchange):
        augmented = images.clone()
        result = backward(state, images, targets, exchange)  # mixes them in place
        seen.append((augmented, images.clone()))
        return result

    monkeypatch.setattr(engine.TrainState, "backward", watched)
    train("--epochs 1 --log_dir", tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    mean, std = (np.array(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for name, images in zip(("augmented", "mixed"), seen[0], strict=True):
        (event,) = events.Images(f"images/{name}")
        grid = np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) / 255
        assert grid.shape == (2 * 16, 8 * 16, 3)
        for number, image in enumerate(images):
            top, left = number // 8 * 16, number % 8 * 16
            shown = grid[top : top + 16, left : left + 16].transpose(2, 0, 1)
            assert np.abs(shown - (image.numpy() * std + mean).clip(0, 1)).max() < 0.005
    plugin = {
        name: HParamsPluginData.FromString(data.plugin_data.content) for name, data in events.summary_metadata.items()
    }
    options = plugin["_hparams_/session_start_info"].session_start_info.hparams
    assert (options["lr"].number_value, options["model"].string_value) == (1e-3, "vit_tiny")
    assert '"embed_dim": 32' in options["model_kwargs"].string_value and "log_dir" not in options
    metrics = [info.name.tag for info in plugin["_hparams_/experiment"].experiment.metric_infos]
    assert metrics == ["perf/test_acc1"], "a curve whose last point is the final accuracy"


# ---------------------------------------------------------------------------------------------------------
# Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, with the arguments of each call of ``init``, and (run, step, row) that was logged."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.Error, module.logged_in = type("Error", (Exception,), {}), True
    module.runs, module.rows = [], []

    def login():
        if not module.logged_in:
            raise module.Error("No API key configured. Use `wandb login` to log in.\nSee the documentation.")

    def init(id="abc123", **how):
        if id == "deleted":
            raise module.Error("run deleted was previously created and deleted")
        module.runs.append({"id": id, **how})
        log = lambda row, step: module.rows.append((id, step, row))  # noqa: E731
        return types.SimpleNamespace(id=id, log=log, finish=lambda exit_code: None)

    module.login, module.init = login, init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_run_without_a_login_at_weights_and_biases_ends_before_it_begins(wandb, train, tmp_path):
    wandb.logged_in = False
    with pytest.raises(InputError) as error:
        train("--enable_wandb true --output_dir", tmp_path / "run")
    assert str(error.value) == (
        "--enable_wandb true: Weights & Biases refuses (No API key configured. Use `wandb login` to log in.); "
        "run `wandb login`, set WANDB_MODE=offline, or leave it out"
    )
    assert not (tmp_path / "run").exists() and not wandb.runs


def test_a_run_that_goes_on_does_so_in_its_run_of_weights_and_biases(wandb, tmp_path):
    options = default_options().replace(enable_wandb=True, output_dir=str(tmp_path), project="mine")
    for first_epoch in (0, 1):
        with MetricLog(options, first_epoch, 3 * first_epoch):
            pass
    first, second = wandb.runs
    assert "resume" not in first and first["project"] == "mine" and first["config"] == options.plain()
    assert (second["id"], second["resume"]) == ("abc123", "allow")
    (tmp_path / WANDB_RUN).write_text("deleted\n")
    with pytest.raises(
        InputError, match=rf"\(run deleted was .*\); delete {tmp_path}/{WANDB_RUN} to start another run"
    ):
        MetricLog(options, 1, 3)


def test_overwriting_a_run_starts_another_at_weights_and_biases(wandb, train, tmp_path):
    (tmp_path / WANDB_RUN).write_text("other\n")
    (tmp_path / "args.json").write_text("{}")
    train("--epochs 1 --enable_wandb true --save_ckpt false --overwrite true --output_dir", tmp_path)
    ((run, step, row),) = wandb.rows
    assert (run, step) == ("abc123", 0) and row.items() >= read_log(tmp_path)[0].items()
    assert (tmp_path / WANDB_RUN).read_text() == "abc123\n"


# ---------------------------------------------------------------------------------------------------------
# A longer run


def test_longer_run_is_refused_with_the_words_that_make_it(tiny_run, train, tmp_path):
    run = tmp_path / "a run"
    command = [*tiny_run, "--output_dir", str(run), "--epochs"]
    main.main([*command, "1"])
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(InputError, match="of a run with --epochs 1, not 3; a longer run has another schedule") as error:
        main.main([*command, "3"])
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    more = shlex.split(str(error.value).partition("end the same command with ")[2])
    main.main([*command, "3", *more])
    longer = tmp_path / "a run-3-epochs"
    assert more == ["--resume", str(run / "checkpoint-0.pth"), "--output_dir", str(longer)]
    assert [row["epoch"] for row in read_log(longer)] == [1, 2]
    assert read_results(longer)["epochs"] == 3
    schedule = parse_args([*command, "3"])
    assert read_log(longer)[-1]["train_lr"] < schedule.lr / 2, "of three epochs"
