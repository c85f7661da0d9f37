"""Several processes: what launchers say, and that two processes train as one does."""

import re
import socket
import subprocess
from pathlib import Path

import pytest
import torch

import main
from distributed import process_group
from distributed.program import Launch, find_launch, run_program
from helpers import TEST_IMAGES, assert_same, read_checkpoint, read_log, read_results
from processes import environment, run_main, start, start_launcher, start_together
from python_server import make_python
from training.options import parse_args
from weight_selection.errors import InputError

ROOT = Path(main.__file__).parent

# ---------------------------------------------------------------------------------------------------------
# What launchers say


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(5, 8, 1)),
        ({"RANK": "5"}, Launch(0, 1, 0)),
        # srun: the step's count, which may be smaller than the allocation's
        (
            {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"},
            Launch(3, 4, 1),
        ),
        # plain python as a step of one task
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, Launch()),
        # plain python in salloc's shell
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, Launch()),
        # plain python in a batch script: it has a PROCID, but no step; waiting for seven others would take forever
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, Launch()),
        # torchrun inside of a job: the nearer launcher counts
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
            Launch(1, 2, 1),
        ),
        # Open MPI's variables may be inherited, so they count only when asked for
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, Launch()),
    ],
)
def test_place_among_processes_is_read_from_the_launcher(environ, expected):
    assert find_launch(environ) == expected


def test_place_among_processes_of_open_mpi():
    environ = {"OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
    assert find_launch(environ, mpi=True) == Launch(6, 8, 2)
    with pytest.raises(InputError, match="--dist_on_itp true"):
        find_launch({}, mpi=True)


def test_processes_of_open_mpi_are_told_where_to_meet(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(InputError, match="--dist_url env://: MASTER_ADDR and MASTER_PORT are not set"):
        process_group.init_distributed(Launch(0, 2, 0), torch.device("cpu"), "env://", timeout=10)


def test_tasks_of_a_slurm_job_meet_at_its_first_node():
    assert process_group.slurm_master({"SLURM_STEP_NODELIST": "n7,n9", "SLURM_JOB_NODELIST": "n1,n7,n9"})[0] == "n7"
    address, port = process_group.slurm_master({"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "123456789"})
    assert address == "n1"
    assert 1024 < int(port) < 65536
    assert port != process_group.slurm_master({"SLURM_JOB_ID": "123456790"})[1], "neighbouring jobs may share a node"


def test_compressed_list_of_slurm_nodes_is_expanded(monkeypatch):
    def scontrol(command, **kwargs):
        assert command == ["scontrol", "show", "hostnames", "n[03-04]"]
        return subprocess.CompletedProcess(command, 0, stdout="n03\nn04\n")

    monkeypatch.setattr(process_group.subprocess, "run", scontrol)
    assert process_group.slurm_master({"SLURM_JOB_NODELIST": "n[03-04]"})[0] == "n03"


@pytest.mark.parametrize("words", [["--local_rank", "1"], ["--local-rank=1"]])
def test_local_rank_is_accepted_in_both_spellings(words):
    assert parse_args(words).local_rank == 1


def test_only_the_first_process_prints_an_error_found_before_they_meet(tiny_run, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run_program("main.py", lambda: main.main([*tiny_run, "--epochs", "0"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------
# Two processes


@pytest.fixture
def by_two(tiny_run, tmp_path):
    """Run main.py with further options in two processes; what each printed."""

    def run(*options, statuses=(0, 0)):
        words = [word for option in options for word in str(option).split()]
        pair = start_together(2, [*tiny_run, *words], tmp_path)
        ended = pair.wait()
        assert ended == list(statuses), pair.printed(0, "err") + pair.printed(1, "err")
        return pair

    return run


def assert_same_run(ours, theirs, last):
    """Equal weights and logs, but for the order in which floats were added up."""
    assert_same(read_checkpoint(ours, last)["model"], read_checkpoint(theirs, last)["model"], rtol=1e-4, atol=1e-6)
    for row, expected in zip(read_log(ours), read_log(theirs), strict=True):
        assert row["test_acc1"] == pytest.approx(expected["test_acc1"])
        for key in ("train_loss", "train_grad_norm", "test_loss", "train_lr", "epoch"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4)


def test_two_processes_train_as_one_does_with_mixup_and_accumulation(tiny_run, train, tmp_path):
    """Momentum instead of AdamW, which would blow up the rounding of gradients that are nearly zero."""
    options = "--total_batch_size 16 --batch_size 4 --drop_path 0.2 --opt momentum --lr 0.1"
    with make_python(tmp_path) as python:
        command = [python, "-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=2"]
        command += [ROOT / "main.py", *tiny_run, *options.split(), "--output_dir", tmp_path / "two"]
        shared = environment(PYTHON_EXEC=str(python))  # what the launcher starts the processes with
        ended = subprocess.run(command, capture_output=True, text=True, env=shared)
    assert ended.returncode == 0, ended.stderr
    train(options, "--output_dir", tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one", last=1)

    results = read_results(tmp_path / "two")
    assert (results["processes"], results["total_batch_size"]) == (2, 16)
    assert TEST_IMAGES % 2 == results["test_images"] % 2 == 1
    for epoch in (0, 1):
        assert len(re.findall(f"^epoch {epoch}: ", ended.stdout, re.MULTILINE)) == 1, "the first process prints"
    lines = ended.stdout.splitlines()
    assert len(lines) == len(set(lines))


def test_two_processes_distill_as_one_does(train, by_two, tmp_path):
    """Student and projector, with accumulation."""
    train(f"--epochs 1 --output_dir {tmp_path}/teacher")
    teacher = (
        f"--teacher vit_tiny --teacher_kwargs embed_dim=32 depth=2 num_heads=2 patch_size=4 --teacher_path {tmp_path}"
    )
    options = f"--distillation feature {teacher}/teacher/checkpoint-0.pth"
    options += " --total_batch_size 16 --batch_size 4 --opt momentum --lr 0.1 --epochs 1"
    by_two(options, "--output_dir", tmp_path / "two")
    train(options, "--output_dir", tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one", last=0)
    projectors = [read_checkpoint(tmp_path / name, 0)["projector"] for name in ("two", "one")]
    assert_same(*projectors, rtol=1e-4, atol=1e-6)
    distances = [read_log(tmp_path / name)[0]["train_distance"] for name in ("two", "one")]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)


def test_two_processes_evaluate_the_batch_statistics_that_they_save(train, by_two, tmp_path, capsys):
    """Each process has its own; what is evaluated and kept is their mean."""
    probe = "--linear_probe true --opt lars --weight_decay 0 --lr 10"
    by_two(probe, "--total_batch_size 16 --epochs 1 --output_dir", tmp_path)
    capsys.readouterr()
    train(probe, "--epochs 1 --eval true --resume", tmp_path / "checkpoint-0.pth")
    loss = float(re.search(r"loss (\d+\.\d+)", capsys.readouterr().out)[1])
    assert loss == pytest.approx(read_log(tmp_path)[0]["test_loss"], rel=1e-5)


def test_two_processes_go_on_with_the_run_of_one(train, by_two, interrupted, tmp_path):
    options = "--total_batch_size 24 --batch_size 12 --mixup 0 --cutmix 0 --opt momentum --lr 0.1 --epochs 3"
    train(options, "--output_dir", tmp_path / "whole")
    interrupted(1, options, "--output_dir", tmp_path / "parts")
    pair = by_two(options, "--output_dir", tmp_path / "parts")
    assert "checkpoint-0.pth, written after epoch 0" in pair.printed(0)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", last=2)
    results = [read_results(tmp_path / name) for name in ("parts", "whole")]
    assert results[0]["best"] == pytest.approx(results[1]["best"], rel=1e-4)
    assert results[0]["processes"] == 2


def test_two_slurm_tasks_share_the_test_images_and_one_prints(train, tiny_run, tmp_path):
    train("--epochs 1 --output_dir", tmp_path)
    with socket.socket() as probe:  # a job number whose port is free
        ports = (port for port in range(20000, 40000) if probe.connect_ex(("127.0.0.1", port)))
        job = next(ports) - 20000
    shared = environment(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NODELIST="127.0.0.1", SLURM_JOB_ID=str(job))
    environs = [shared | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in (0, 1)]
    words = [*tiny_run, "--eval", "true", "--resume", str(tmp_path / "checkpoint-0.pth")]
    tasks = start(run_main, environs, tmp_path, words)
    assert tasks.wait() == [0, 0], tasks.printed(0, "err") + tasks.printed(1, "err")
    row = read_log(tmp_path)[0]
    metrics = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", tasks.printed(0).split(":")[-1])}
    assert metrics["images"] == TEST_IMAGES
    assert metrics["acc1"] == pytest.approx(row["test_acc1"], rel=1e-4)
    assert metrics["loss"] == pytest.approx(row["test_loss"], rel=1e-4)
    assert tasks.printed(1) == ""


def test_loss_that_is_not_finite_ends_both_processes_with_one_line(tiny_run, tmp_path):
    words = [*tiny_run, *["--lr", "1e20", "--opt", "momentum", "--total_batch_size", "16"]]
    ended = start_launcher(2, words, tmp_path, restarts=0)
    assert ended.wait() == [1]
    assert ended.printed(0, "err").count("main.py: error: loss is ") == 1
    assert "[rank1]: Traceback" not in ended.printed(0, "err")
