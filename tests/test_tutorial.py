"""docs/tutorial.md: every command runs as it stands there, on fewer images and for one epoch."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch

import main
import tutorial_images
from weight_selection.cli import main as select_main

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SMALL = ["--epochs", "1", "--warmup_epochs", "0", "--total_batch_size", "10", "--num_workers", "0", "--device", "cpu"]


def run(command):
    python, script, *words = shlex.split(command)
    assert python == "python"
    if script == "main.py":
        main.main(words + (SMALL if "--eval" not in words else ["--num_workers", "0", "--device", "cpu"]))
    elif script == "weight_selection.py":
        select_main(words)
    else:
        import_module(Path(script).stem).main(words)


@pytest.mark.slow
def test_every_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(tutorial_images, "PATTERNS", {"train": 2, "val": 1})
    monkeypatch.setattr(tutorial_images, "PHOTOGRAPHS", {"train": 2, "val": 1})
    assert len(COMMANDS) == 10
    for command in COMMANDS:
        run(command)
    printed = capsys.readouterr().out
    assert "pagoda/000.png" in printed
    written = ["init/vit.pth", "curves.png", "report/worst.png", "hub/config.json", "model.onnx"]
    assert all((tmp_path / "tutorial" / name).is_file() for name in written)
    model = timm.create_model(f"local-dir:{tmp_path}/tutorial/hub", pretrained=True)
    trained = torch.load(tmp_path / "tutorial/selected/checkpoint-best.pth", weights_only=True)["model"]
    assert torch.equal(model.state_dict()["pos_embed"], trained["pos_embed"])
