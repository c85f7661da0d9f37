"""What happens to a run: signals, kills, damaged checkpoints, a full disk, losses that are not finite."""

import functools
import gc
import io
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engine
import main
import training.run
from bench_faults import differences, partial_files
from datasets import ImageFiles
from distributed.program import Stopped, run_program
from helpers import read_checkpoint, read_log
from processes import start_launcher, start_together
from training import checkpoint, output_dir
from training.options import parse_args
from weight_selection.errors import InputError
from weight_selection.sources import safe_load

BFLOAT16 = ["--use_amp", "true"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
# All that could be lost: accumulation, mixed precision, a moving average, mixup, drop path. 3 epochs of 2 steps.
EVERYTHING = "--epochs 3 --batch_size 8 --update_freq 3 --drop_path 0.2 --num_workers 1 --output_dir run"
EVERYTHING += " --model_ema true --model_ema_decay 0.8 --model_ema_eval true"


def everything(*options):
    return " ".join([EVERYTHING, *BFLOAT16, *options])


PLAIN = "--epochs 3 --batch_size 24 --output_dir run"  # as many steps


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """``uninterrupted(options)``: directory of a run with these options that was never interrupted."""

    @functools.cache
    def run(options):
        directory = tmp_path_factory.mktemp("whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(directory)
            train(options)
        return directory / "run"

    return run


@pytest.fixture(scope="module")
def whole(uninterrupted):
    """Directory of a run with everything that was never interrupted."""
    return uninterrupted(everything())


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if children := multiprocessing.active_children():  # loader workers of a run that ended with an exception
        for child in children:
            child.kill()
            child.join()
        gc.collect()
    signal.signal(signal.SIGCHLD, handler)


def send(number):
    return lambda: os.kill(os.getpid(), number)


# ---------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGTERM, everything()), (signal.SIGUSR1, PLAIN), (signal.SIGINT, PLAIN)]
)
def test_signal_within_an_epoch_saves_and_the_run_ends_as_if_there_had_been_none(
    train, uninterrupted, at_call, number, options
):
    """All that could be lost is followed through one signal: the others differ from it in their number alone."""
    whole = uninterrupted(options)
    calls, before = at_call(engine.TrainState, "update", 3, send(number)), signal.getsignal(number)
    with pytest.raises(Stopped, match="the same command goes on from run/checkpoint-1-step-1.pth") as stopped:
        train(options)
    assert stopped.value.number == number
    assert signal.getsignal(number) is before, "handlers are put back; it may be ignored, as in a job of a shell"
    assert len(calls) == 3, "the first of two steps of epoch 1"
    assert len(read_log(Path("run"))) == 1
    train(options)
    assert len(calls) == 6, "no step is taken twice"
    assert differences(Path("run"), whole) == []


def test_signal_in_the_evaluation_saves_the_epoch_before_it(train, whole, at_call):
    calls = at_call(engine.TrainState, "update", 99, None)
    at_call(training.run, "evaluate_with_ema", 2, send(signal.SIGTERM))
    with pytest.raises(Stopped, match="run/checkpoint-1-step-2.pth"):
        train(everything())
    train(everything())
    assert len(calls) == 6
    assert differences(Path("run"), whole) == []


def test_second_ctrl_c_does_not_wait_for_the_step(train, at_call):
    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    at_call(engine.TrainState, "update", 2, twice)
    with pytest.raises(Stopped, match="nothing was saved"):
        train("--output_dir run")
    assert not list(Path("run").glob("*.pth"))


def test_second_ctrl_c_does_not_wait_for_an_evaluation(train, at_call):
    def twice():
        send(signal.SIGTERM)()
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    at_call(training.run, "evaluate_with_ema", 1, twice)
    with pytest.raises(Stopped, match="nothing was saved"):
        train("--output_dir run")
    assert not list(Path("run").glob("*.pth"))


def test_signal_before_training_ends_at_once_and_leaves_nothing(train, at_call):
    at_call(training.run, "build_model", 1, send(signal.SIGTERM))
    with pytest.raises(Stopped, match="nothing was saved"):
        train("--output_dir run")
    assert not Path("run").exists()


def test_signal_in_a_destructor_before_training_is_not_lost(train, at_call, monkeypatch):
    """Python ignores what a __del__ raises. A DataLoader's iterator has one."""

    class Dying:
        def __del__(self):
            send(signal.SIGTERM)()

    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: None)
    at_call(training.run, "build_model", 1, lambda: Dying() and None)
    with pytest.raises(Stopped, match="goes on from run/checkpoint-0-step-1.pth"):
        train("--output_dir run")


def test_signal_without_output_dir_stops_too(train, at_call):
    at_call(engine.TrainState, "update", 2, send(signal.SIGUSR1))
    with pytest.raises(Stopped, match="nothing was saved"):
        train("")


def test_checkpoints_within_an_epoch_are_kept_until_it_is_over(train, at_call, image_folder):
    kept = []

    def look():
        kept.append(sorted(path.name for path in Path("run").glob("checkpoint-[0-9]*.pth")))

    for number in (5, 6, 7, 12, 13):
        at_call(engine.TrainState, "update", number, look)
    train("--batch_size 8 --save_ckpt_steps 2 --save_ckpt_num 2 --output_dir run")
    assert (
        kept
        == [
            ["checkpoint-0-step-2.pth", "checkpoint-0-step-4.pth"],
            ["checkpoint-0-step-2.pth", "checkpoint-0-step-4.pth"],
            ["checkpoint-0.pth"],
            ["checkpoint-0.pth", "checkpoint-1-step-2.pth", "checkpoint-1-step-4.pth"],
        ][: len(kept)]
    )
    assert len(kept) >= 4
    look()
    assert kept[-1] == ["checkpoint-0.pth", "checkpoint-1.pth"]


# ---------------------------------------------------------------------------------------------------------
# Kills. benchmarks/bench_faults.py has many more of them.


def test_run_killed_while_it_writes_a_checkpoint_ends_as_if_it_had_not_been(tiny_run, train, whole, tmp_path):
    options = [*tiny_run, *everything("--save_ckpt_steps 1").split()]
    for reached in (lambda: partial_files(tmp_path), Path("run/checkpoint-1-step-1.pth").exists):
        run = start_together(1, options, tmp_path)
        wait_for(reached, run)
        run.kill()
    train(everything("--save_ckpt_steps 1"))
    found = [what for what in differences(Path("run"), whole) if "save_ckpt_steps" not in what]
    assert found == []


def test_one_of_three_processes_is_killed_and_the_run_ends_as_if_it_had_not_been(tiny_run, tmp_path):
    """Three: with two, floats are added up in the same order whatever happens."""
    everything_by_three = everything("--total_batch_size 24 --batch_size 4 --save_ckpt_steps 1")
    options = [*tiny_run, *everything_by_three.replace("--update_freq 3", "").split(), "--num_workers", "0"]
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    three = start_together(3, options, tmp_path / "killed")
    wait_for(Path("killed/run/checkpoint-1-step-1.pth").exists, three)
    three.processes[2].kill()
    assert three.wait() == [1, 1, -signal.SIGKILL]
    for name in ("killed", "whole"):
        assert start_together(3, options, tmp_path / name).wait() == [0, 0, 0]
    for path in tmp_path.glob("*/*.txt"):
        path.unlink()
    assert differences(Path("killed/run"), Path("whole/run")) == []


def test_torchrun_goes_on_by_itself_after_one_process_was_killed(tiny_run, tmp_path):
    options = ["--epochs", "3", "--batch_size", "8", "--save_ckpt_steps", "1", "--output_dir", "run"]
    run = start_launcher(2, [*tiny_run, *options], tmp_path)
    wait_for(Path("run/checkpoint-1-step-1.pth").exists, run)
    os.kill(run.workers()[0], signal.SIGKILL)
    assert run.wait() == [0]
    assert "resumed run/checkpoint-1" in run.printed(0)
    assert [row["epoch"] for row in read_log(Path("run"))] == [0, 1, 2]


def wait_for(reached, run, limit=60):
    start = time.monotonic()
    while not reached():
        assert time.monotonic() - start < limit, run.printed(0)
        time.sleep(0.0005)


@pytest.mark.parametrize(
    ("fate", "says"), [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "does not answer (--timeout)")]
)
def test_process_whose_partner_is_gone_or_hangs_ends_with_a_line(tiny_run, tmp_path, fate, says):
    options = ["--epochs", "1000", "--batch_size", "8", "--timeout", "2", "--output_dir", "run"]
    pair = start_together(2, [*tiny_run, *options], tmp_path)
    wait_for(Path("run/checkpoint-2.pth").exists, pair)
    os.kill(pair.processes[1].pid, fate)
    pair.processes[0].join(60)
    pair.kill()
    assert pair.processes[0].exitcode == 1
    errors = pair.printed(0, "err")
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"main.py, process 0: error: another process {says}")


def test_signal_to_one_process_stops_both_at_the_same_step_with_a_status_to_requeue_on(tiny_run, tmp_path):
    options = [*tiny_run, *["--epochs", "1000", "--batch_size", "8", "--num_workers", "1", "--output_dir", "run"]]
    pair = start_together(2, options, tmp_path)
    wait_for(Path("run/checkpoint-2.pth").exists, pair)
    os.kill(pair.processes[1].pid, signal.SIGTERM)
    assert pair.wait() == [75, 75]
    saved = checkpoint.numbered("run")[-1]
    assert pair.printed(0, "err") == f"main.py: stopped by SIGTERM; the same command goes on from {saved}\n"
    assert pair.printed(1, "err") == ""


# ---------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def stopped(interrupted):
    """A run of three epochs that was stopped after two: run/ with checkpoint-0.pth and checkpoint-1.pth."""
    interrupted(2, "--epochs 3 --output_dir run")
    return Path("run")


@pytest.mark.parametrize("damage", ["cut off", "a bit", "empty"])
def test_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(train, stopped, damage, capsys):
    path = stopped / "checkpoint-1.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut off": content[:-1000], "a bit": content, "empty": b""}[damage])
    train("--epochs 3 --output_dir run")
    output = capsys.readouterr().out
    assert "warning: run/checkpoint-1.pth is damaged (" in output
    assert "resumed run/checkpoint-0.pth" in output
    assert (stopped / "checkpoint-1.pth.damaged").exists()
    train("--epochs 3 --output_dir other")
    (stopped / "checkpoint-1.pth.damaged").unlink()
    assert [what for what in differences(stopped, Path("other")) if "output_dir" not in what] == []


def test_run_whose_checkpoints_are_all_damaged_is_not_started_anew(train, stopped):
    for path in checkpoint.numbered(stopped):
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(InputError, match="--output_dir run: all its checkpoints are damaged; .*--overwrite true"):
            train("--epochs 3 --output_dir run")
    assert len(list(stopped.glob("*.damaged"))) == 2


@given(st.data())
def test_changed_bit_anywhere_in_a_checkpoint_is_found_or_changes_nothing(data):
    content = bytearray(SMALL)
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    content[place // 8] ^= 1 << place % 8
    Path("small.pth").write_bytes(content)
    try:
        found = safe_load.load_torch("small.pth", "--resume")
    except InputError:
        return
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


WEIGHTS = {"weight": torch.arange(48.0).view(6, 8), "bias": torch.zeros(6), "steps": torch.tensor(7)}
SMALL = (lambda file: (torch.save(WEIGHTS, file), file.getvalue())[1])(io.BytesIO())


def test_checkpoint_of_the_version_before_goes_on(train, stopped):
    path = stopped / "checkpoint-1.pth"
    content = read_checkpoint(stopped, 1)
    for key in ("version", "partial", "train_images", "bad_images"):
        del content[key]
    new = ("save_ckpt_steps", "timeout", "skip_bad_images", "deterministic")
    content["args"] = {key: value for key, value in content["args"].items() if key not in new}
    torch.save(content, path)
    train("--epochs 3 --output_dir run")
    assert [row["epoch"] for row in read_log(stopped)] == [0, 1, 2]


def test_checkpoint_in_the_output_directory_that_is_not_of_the_run(train, stopped):
    content = read_checkpoint(stopped, 1)
    torch.save(content | {"optimizer": {}}, stopped / "checkpoint-1.pth")
    with pytest.raises(InputError, match="checkpoint-1.pth: of another optimiser: .*; start anew in another directory"):
        train("--epochs 3 --output_dir run")


def test_checkpoint_of_a_later_version_says_so(train, stopped):
    torch.save(read_checkpoint(stopped, 1) | {"version": 99}, stopped / "checkpoint-1.pth")
    with pytest.raises(InputError, match="checkpoint-1.pth: of version 99, .*; update"):
        train("--epochs 3 --output_dir run")


def test_going_back_to_an_older_checkpoint_needs_a_place_of_its_own(train, stopped):
    with pytest.raises(InputError, match="--resume run/checkpoint-0.pth: --output_dir holds checkpoint-1.pth"):
        train("--epochs 3 --output_dir run --resume run/checkpoint-0.pth")
    train("--epochs 3 --output_dir other --resume run/checkpoint-0.pth")
    assert len(checkpoint.numbered(stopped)) == 2


def test_run_that_resumes_another_goes_on_by_the_same_command_too(train, interrupted, stopped):
    options = "--epochs 5 --resume run/checkpoint-1.pth --output_dir"
    train(options, "whole")
    interrupted(4, options, "other")
    train(options, "other")
    assert [what for what in differences(Path("other"), Path("whole")) if "output_dir" not in what] == []


@pytest.mark.parametrize("opt", ["lamb", "muon", "adafactor", "sgdw"])
def test_run_of_every_kind_of_optimiser_goes_on(train, interrupted, opt):
    options = f"--opt {opt} --epochs 2 --output_dir run"
    interrupted(1, options)
    train(options)
    assert [row["epoch"] for row in read_log(Path("run"))] == [0, 1]


@pytest.mark.parametrize("launcher", ["TORCHELASTIC", "SLURM"])
def test_run_that_its_launcher_starts_again_is_not_overwritten(train, at_call, monkeypatch, launcher, capsys):
    at_call(engine.TrainState, "update", 4, send(signal.SIGTERM))
    with pytest.raises(Stopped, match="the same command without --overwrite goes on from run/checkpoint-1-step-1.pth"):
        train("--overwrite true --output_dir run")
    monkeypatch.setenv(f"{launcher}_RESTART_COUNT", "1")
    train("--overwrite true --output_dir run")
    assert "resumed run/checkpoint-1-step-1.pth" in capsys.readouterr().out


def test_full_disk_ends_the_run_with_a_line_and_it_goes_on_when_there_is_space(tiny_run, train, stopped):
    """A limit of file sizes, as a full disk would: the operating system refuses to write on."""
    before = {path.name: path.read_bytes() for path in stopped.glob("*.pth")}
    size = len(before["checkpoint-1.pth"])
    options = [*tiny_run, "--epochs", "3", "--output_dir", "run"]
    limited = start_together(1, options, Path.cwd(), largest_file=size // 2)
    assert limited.wait() == [1]
    errors = limited.printed(0, "err")
    assert errors.startswith("main.py: error: cannot write run/checkpoint-")
    assert len(errors.splitlines()) == 1
    assert before == {path.name: path.read_bytes() for path in stopped.glob("*.pth")}
    assert not partial_files(Path())
    train("--epochs 3 --output_dir run")
    assert [row["epoch"] for row in read_log(stopped)] == [0, 1, 2]


def test_disk_that_is_full_from_the_start_is_no_traceback(tiny_run):
    options, before = parse_args([*tiny_run, "--output_dir", "run"]), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # as above
    try:
        with pytest.raises(InputError, match="cannot write run/args.json: "), output_dir.reserve(options):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(Path("run").iterdir())


def test_second_run_in_a_directory_is_refused_until_the_first_has_ended(tiny_run, train, tmp_path):
    options = ["--epochs", "1000", "--batch_size", "8", "--output_dir", "run"]
    first = start_together(1, [*tiny_run, *options], tmp_path)
    wait_for(Path("run/checkpoint-0.pth").exists, first)
    holder = re.escape(f"(process {first.processes[0].pid} on ")
    with pytest.raises(InputError, match="--output_dir run: another run is writing there " + holder):
        train("--epochs 1000 --batch_size 8 --output_dir run")
    first.kill()
    with pytest.raises(InputError, match="of a run with --epochs 1000, not 1;"):  # the lock has gone with the process
        train("--epochs 1 --batch_size 8 --output_dir run")


def test_lock_that_is_a_link_elsewhere_is_not_followed(train):
    Path("run").mkdir()
    Path("precious").write_text("mine")
    Path("run/.lock").symlink_to("../precious")
    with pytest.raises(InputError, match="--output_dir run: cannot open its .lock"):
        train("--output_dir run")
    assert Path("precious").read_text() == "mine"


def test_damaged_log_is_named_by_its_line(train, stopped):
    log = stopped / "log.txt"
    log.write_text(log.read_text().splitlines()[0] + '\n{"epoch": 1, "train_lo\n')
    with pytest.raises(InputError, match="run/log.txt: damaged in line 2 .*repair it, or move it away"):
        train("--epochs 3 --output_dir run")


def test_other_images_total_batch_or_seed_cannot_take_over_within_an_epoch(train, at_call, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    at_call(engine.TrainState, "update", 2, send(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(f"--data_path {data} --output_dir run")
    with pytest.raises(InputError, match="written within an epoch of --total_batch_size 16, not 8; name another"):
        train(f"--data_path {data} --batch_size 8 --resume run --output_dir other")
    with pytest.raises(InputError, match="written within an epoch of --seed 0, not 1; name another"):
        train(f"--data_path {data} --seed 1 --resume run --output_dir other")
    (data / "train" / "red" / "2.png").unlink()
    with pytest.raises(InputError, match="within an epoch of 48 images, now there are 47"):
        train(f"--data_path {data} --output_dir run")


# ---------------------------------------------------------------------------------------------------------
# Loader workers


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (lambda self, index: time.sleep(60), "DataLoader timed out after 1"),
        (lambda self, index: os.kill(os.getpid(), signal.SIGKILL), "DataLoader worker (pid"),
    ],
)
def test_loader_worker_that_hangs_or_dies_ends_the_run_with_a_line(tiny_run, monkeypatch, capsys, does, says):
    monkeypatch.setattr(ImageFiles, "__getitem__", does)
    with pytest.raises(SystemExit) as ended:
        run_program("main.py", lambda: main.main([*tiny_run, "--num_workers", "1", "--timeout", "1"]))
    assert ended.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"main.py, process 0: error: --num_workers: {says}")
