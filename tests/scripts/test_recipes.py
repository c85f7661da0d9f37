"""The recipes that come with the project: main.py takes them, what they say of the paper is so, old paths are read."""

import re
from pathlib import Path

import pytest
import yaml

import paper
from training.options import parse_args, share_batch

ROOT = Path(__file__).parents[2]
FILES = {
    path.relative_to(ROOT).as_posix(): yaml.safe_load(path.read_text())
    for directory in ("recipes", "experiments")
    for path in sorted((ROOT / directory).glob("*.yaml"))
}
MOVED = FILES.pop("recipes/moved.yaml")
RECIPES = [f"{file}:{section}" for file, content in FILES.items() for section in content.get("sections", ())]
RECIPES += [file for file, content in FILES.items() if "sections" not in content]
PAPER = r"bash scripts/table(\d\d)\.sh (\w+) (\w+); paper, Table (\d+), random init ([\d.]+), weight selection ([\d.]+)"


def options(path):
    args = vars(parse_args(["--config", str(ROOT / path)]))
    return {name: value for name, value in args.items() if name != "config"}


@pytest.mark.parametrize("path", RECIPES)
def test_main_takes_every_recipe(path, capsys):
    assert options(path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("recipe", "batch_size", "update_freq"),
    [
        ("vit_tiny.yaml:cifar100", 64, 1),
        ("convnext_femto.yaml:cifar100", 128, 1),
        ("vit_tiny.yaml:imagenet", 128, 4),
        ("convnext_femto.yaml:imagenet", 128, 4),
    ],
)
def test_eight_processes_have_the_micro_batches_of_the_releases_readme(recipe, batch_size, update_freq):
    shared = share_batch(parse_args(["--config", str(ROOT / "recipes" / recipe)]), 8)
    assert (shared.batch_size, shared.update_freq) == (batch_size, update_freq)


@pytest.mark.parametrize("setting", paper.contents()["recipes"])
def test_each_section_says_its_command_and_the_papers_accuracies(setting):
    for section, recipe in FILES[f"recipes/{setting}.yaml"]["sections"].items():
        if section == "base":
            continue
        table, *words, same_table, random, selected = re.fullmatch(PAPER, recipe["about"]).groups()
        data = section.removeprefix("linear_probe_")
        prefix = f"{setting}/{data}/" + section.removesuffix(data)
        values = {cell.run: str(cell.paper) for cell in paper.read_table(table).cells}
        assert (int(table), words) == (int(same_table), [setting, data])
        assert (random, selected) == (values[f"{prefix}random"], values[f"{prefix}selected"])


@pytest.mark.parametrize("path", [f"recipes/{setting}.yaml" for setting in paper.contents()["recipes"]])
def test_sections_of_a_student_are_read_by_their_old_paths_too(path, capsys):
    for section in FILES[path]["sections"]:
        assert options(f"{path.removesuffix('.yaml')}/{section}.yaml") == options(f"{path}:{section}")
        assert f"is now {ROOT / path}:{section}, which is read" in capsys.readouterr().err


@pytest.mark.parametrize("path", MOVED)
def test_recipes_that_moved_are_read_by_their_old_paths_too(path, capsys):
    new = MOVED[path].removeprefix("../")
    assert new in RECIPES and not (ROOT / "recipes" / path).exists()
    assert options(f"recipes/{path}") == options(new)
    assert f"is now {ROOT / new}, which is read" in capsys.readouterr().err


def test_only_the_first_process_says_that_a_recipe_moved(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        options("recipes/vit_tiny/cifar10.yaml")
        assert len(capsys.readouterr().err.splitlines()) == lines
