"""Every example runs offline, and is short enough to be read and copied."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
PRINTED = {  # what an example says, if it is more than something
    "llama.py": r"75 tensors are selected, 64 of 104 neurons of the stream",
    "own_training_loop.py": r"student, 2 epochs: \d\d\.\d% from selected weights, \d\d\.\d% from random ones",
    "huggingface_vit.py": r"38 tensors are selected; the student keeps its own classifier\.weight and classifier\.bias",
    "torchvision_resnet.py": r"120 tensors are selected; the student keeps its own fc\.weight and fc\.bias",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_is_short(path, monkeypatch, capsys, tmp_path):
    assert len(path.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.chdir(tmp_path)  # what it writes goes there
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(PRINTED.get(path.name, r"\w"), capsys.readouterr().out)
