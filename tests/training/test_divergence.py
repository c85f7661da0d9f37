"""Losses and gradients that are not finite, and steps that the loss scaler of float16 skips."""

import contextlib
import functools
import math
import signal
from pathlib import Path

import pytest
import torch

import engine
import training.setup
from bench_faults import differences
from distributed.program import RunError, Stopped
from helpers import read_checkpoint, read_log
from models import distillation
from training import checkpoint


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def loss_times(monkeypatch):
    """``loss_times(factor, first)``: multiply the loss from that micro-batch on, counted from 1."""

    def prepare(factor, first=1):
        loss, calls = distillation.Loss.__call__, []

        def changed(self, images, outputs, targets):
            calls.append(None)
            value, distance = loss(self, images, outputs, targets)
            return value * (factor if len(calls) >= first else 1), distance

        monkeypatch.setattr(distillation.Loss, "__call__", changed)

    return prepare


@pytest.mark.parametrize("interval", [1, 50])
def test_loss_that_is_not_finite_is_named_by_its_step_and_not_saved(train, loss_times, monkeypatch, interval):
    monkeypatch.setattr(engine, "SYNCHRONIZE_INTERVAL", interval)
    loss_times(math.nan, first=11)  # 6 steps an epoch
    named = r"loss is nan and the gradient's norm nan at step 5 of epoch 1, at lr \d\.\d\de-0\d;"
    with pytest.raises(RunError, match=named):
        train("--batch_size 8 --epochs 3 --save_ckpt_steps 2 --output_dir run")
    for path in Path("run").glob("*.pth"):
        assert all(value.isfinite().all() for value in torch.load(path)["model"].values()), path
    assert checkpoint.numbered("run")[-1].name == "checkpoint-1-step-4.pth"


def test_gradient_that_is_not_finite_is_found_while_the_loss_still_is(train, loss_times):
    loss_times(1e38)
    with pytest.raises(RunError, match=r"loss is \S+e\+38 and the gradient's norm (inf|nan) at step 1 of epoch 0"):
        train("--output_dir run")


@pytest.fixture
def in_float16(monkeypatch):
    """float16 with loss scaling, which main.py leaves to GPUs, on the CPU; its first scale."""

    def prepare(scale):
        complete = training.setup.complete_options
        forced = {"use_amp": True, "amp_dtype": "float16"}
        monkeypatch.setattr(training.setup, "complete_options", lambda *args: complete(*args).replace(**forced))
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=scale))

    return prepare


def test_steps_that_the_loss_scaler_skips_are_counted(train, in_float16):
    in_float16(2.0**22)
    train("--batch_size 4 --epochs 2 --output_dir run")
    rows = read_log(Path("run"))
    skipped = sum(row["train_skipped_steps"] for row in rows)
    assert 3 < skipped < 20
    assert rows[1]["train_loss_scale"] == 2.0 ** (22 - skipped)
    assert all(math.isfinite(row["train_grad_norm"]) for row in rows)
    steps = {state["step"].item() for state in read_checkpoint(Path("run"), 1)["optimizer"]["state"].values()}
    assert steps == {24 - skipped}


def test_float16_run_goes_on_with_the_scale_it_had(train, in_float16, at_call):
    in_float16(2.0**22)
    train("--batch_size 4 --output_dir run")
    Path("run").rename("whole")
    at_call(engine.TrainState, "update", 8, lambda: signal.raise_signal(signal.SIGTERM))
    for end in (pytest.raises(Stopped), contextlib.nullcontext()):
        with end:
            train("--batch_size 4 --output_dir run")
    assert differences(Path("run"), Path("whole")) == []


def test_loss_scaler_without_a_scale_ends_the_run(train, in_float16, loss_times):
    in_float16(4.0)
    loss_times(1e30)
    with pytest.raises(RunError, match="loss scale is 0.5 by step 3 of epoch 0, and gradients still overflow float16"):
        train("--output_dir run")
