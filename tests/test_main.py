"""How main.py ends when something is wrong, and that mistakes in options do not wait for torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import main
from distributed.program import RunError, run_program
from python_server import make_python
from weight_selection.errors import InputError

ROOT = Path(main.__file__).parent

# ---------------------------------------------------------------------------------------------------------
# How errors end


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (InputError("--a b:\nc"), 2, "main.py: error: --a b: c\n"),
        (RunError("no"), 1, "main.py: error: no\n"),
        (KeyboardInterrupt(), 130, "\nmain.py: interrupted\n"),
        (None, 0, ""),
    ],
)
def test_status_and_line_of_each_way_to_end(error, status, lines, capsys):
    def program():
        if error:
            raise error

    with pytest.raises(SystemExit) as ended:
        run_program("main.py", program)
    assert ended.value.code == status
    assert capsys.readouterr().err == lines


def test_error_is_one_line_and_status_2(tiny_run, tmp_path):
    with make_python(tmp_path) as python:
        command = [str(python), str(ROOT / "main.py"), *tiny_run, "--model", "vit_tinny"]
        ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("main.py: error: --model vit_tinny: no such model; did you mean ")


def test_loss_that_is_not_finite_ends_the_run_with_status_1(tiny_run, tmp_path, capsys):
    command = [*tiny_run, "--lr", "1e20", "--opt", "momentum", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        run_program("main.py", lambda: main.main(command))
    assert ended.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("main.py: error: loss is ")
    assert "--lr" in errors[0]
    assert not list(tmp_path.glob("*.pth")), "weights that are not finite are not kept"


# ---------------------------------------------------------------------------------------------------------
# Start-up


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("main.py --help", 0),
        ("main.py --epochs 0", 2),
        ("main.py --no_such_option", 2),
        ("main.py --data_set no_such_set", 2),
        ("main.py --initialize no_such_file.pth", 2),
        ("main.py --config no_such_file.yaml", 2),
        ("main.py --model_kwargs num_classes=3", 2),
        ("main.py --total_batch_size 7", 2),
        ("weight_selection.py --help", 0),
        ("weight_selection.py --model_type no_such_type", 2),
        ("weight_selection.py --model_type vit --pretrained_path no_such_file.pth --output_dir x", 2),
        ("weight_selection.py --model_type vit --seed 3 --output_dir x", 2),
    ],
)
def test_help_and_mistakes_in_options_do_not_wait_for_torch(command, status):
    """To import torch takes seconds; without it they take a fraction of one: ``benchmarks/bench_startup.py``."""
    program, *words = command.split()
    run = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / program), *words], capture_output=True, text=True
    )
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    said = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert run.returncode == status
    assert "argparse" in imported
    assert not imported & {"torch", "timm", "torchvision", "sklearn", "scipy", "huggingface_hub"}
    assert len(said) == (status != 0), "one line for an error"
