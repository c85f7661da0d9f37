"""Recipes: sections, bases, paths of earlier revisions, and what is refused of them."""

import sys

import pytest

from weight_selection.errors import InputError
from weight_selection.sources.recipe import read_recipe, read_student

SECTIONS = """
about: a student
model: vit_tiny
lr: 1.0
sections:
  plain:
  cifar: {data_set: CIFAR100, epochs: 5, about: the paper's}
  longer: {base: cifar, epochs: 9}
  other: {base: [longer, ../flat.yaml], model_kwargs: {depth: 3}}
  round: {base: about}
  about: {base: round}
  list: [1]
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """The working directory, with recipes/vit.yaml of several sections and flat.yaml, which is plain."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "vit.yaml").write_text(SECTIONS)
    (tmp_path / "flat.yaml").write_text("lr: 2.0\n")
    return tmp_path


def refused(path, read=read_recipe):
    with pytest.raises(InputError) as caught:
        read(path, "--config")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_section_goes_over_its_bases_and_those_over_what_sections_share(recipes):
    shared = {"model": ["vit_tiny"], "lr": ["1.0"]}
    cifar = shared | {"data_set": ["CIFAR100"], "epochs": ["5"]}
    assert read_recipe("recipes/vit.yaml:plain", "--config") == shared
    assert read_recipe("recipes/vit.yaml:cifar", "--config") == cifar
    assert read_recipe("recipes/vit.yaml:longer", "--config") == cifar | {"epochs": ["9"]}
    other = cifar | {"epochs": ["9"], "lr": ["2.0"], "model_kwargs": ["depth=3"]}
    assert read_recipe("recipes/vit.yaml:other", "--config") == other


def test_a_plain_recipe_may_have_a_section_as_its_base(recipes):
    (recipes / "own.yaml").write_text("base: recipes/vit.yaml:longer\nlr: 3.0\n")
    assert read_recipe("own.yaml", "--config")["lr"] == ["3.0"]
    assert read_recipe("own.yaml", "--config")["epochs"] == ["9"]


def test_the_path_of_a_file_that_became_a_section_is_read_and_said(recipes, capsys):
    (recipes / "own.yaml").write_text("base: recipes/vit/cifar.yaml\n")
    for path in ("recipes/vit/cifar.yaml", "own.yaml"):
        assert read_recipe(path, "--config") == read_recipe("recipes/vit.yaml:cifar", "--config")
        assert capsys.readouterr() == ("", "recipes/vit/cifar.yaml is now recipes/vit.yaml:cifar, which is read\n")
    (recipes / "recipes" / "vit").mkdir()
    (recipes / "recipes" / "vit" / "cifar.yaml").write_text("epochs: 1\n")  # a file that is there is what it was
    assert read_recipe("recipes/vit/cifar.yaml", "--config") == {"epochs": ["1"]}
    assert capsys.readouterr() == ("", "")


def test_a_directory_may_say_where_its_recipes_have_gone(recipes):
    (recipes / "recipes" / "moved.yaml").write_text("short.yaml: ../flat.yaml\nsmall/a.yaml: vit.yaml:cifar\n")
    said = []
    assert read_recipe("recipes/short.yaml", "--config", said.append) == {"lr": ["2.0"]}
    assert read_recipe("recipes/small/a.yaml", "--config", said.append)["epochs"] == ["5"]
    assert [line.split(", ")[0] for line in said] == [
        "recipes/short.yaml is now flat.yaml",
        "recipes/small/a.yaml is now recipes/vit.yaml:cifar",
    ]


def test_a_file_whose_name_has_a_colon_comes_first(recipes):
    (recipes / "recipes" / "vit.yaml:cifar").write_text("epochs: 3\n")
    assert read_recipe("recipes/vit.yaml:cifar", "--config") == {"epochs": ["3"]}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("recipes/vit.yaml", "recipes/vit.yaml: name a section, as in recipes/vit.yaml:plain; it has plain, cifar, "),
        ("recipes/vit.yaml:pets", ":pets: no section pets; recipes/vit.yaml has plain, cifar, longer, other, "),
        ("recipes/vit/pets.yaml", "no section pets; recipes/vit.yaml has plain, cifar, longer, other, "),
        ("flat.yaml:pets", "flat.yaml:pets: no section pets; flat.yaml has none"),
        ("recipes/vit.yaml:round", "recipes/vit.yaml:round, a base of recipes/vit.yaml:about: is its own base"),
        ("recipes/vit.yaml:list", "a section must be NAME: VALUE lines"),
        ("none.yaml:cifar", "none.yaml:cifar: cannot be read (not a file)"),
        (r"C:\recipes\none.yaml", r"C:\recipes\none.yaml: cannot be read (not a file)"),
    ],
)
def test_sections_that_cannot_be_read(recipes, path, reason):
    assert refused(path).startswith("--config ")
    assert reason in refused(path)


@pytest.mark.parametrize("sections", ["", "[a]", "{}"])
def test_sections_that_are_none(recipes, sections):
    (recipes / "own.yaml").write_text(f"sections: {sections}\n")
    assert refused("own.yaml") == "--config own.yaml: sections must be NAME: RECIPE lines"


def test_a_student_is_what_main_would_train(recipes):
    (recipes / "own.yaml").write_text("base: recipes/vit.yaml:other\ninput_size: 32\n")
    assert read_student("recipes/vit.yaml:other", "--student_config") == ("vit_tiny", {"depth": 3}, 224)
    assert read_student("own.yaml", "--student_config") == ("vit_tiny", {"depth": 3}, 32)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("epochs: 3", "own.yaml: has no model"),
        (
            "model: vit_tiny\nmodel_kwarg: {depth: 3}",
            "model_kwarg is not an option of main.py; did you mean",
        ),
        ("model: vit_tiny\nmodel_kwargs: depth", "--model_kwargs depth: write NAME=VALUE"),
        ("model: vit_tiny\nmodel_kwargs: {depth: [3]}", "model_kwargs must be a word, a list of words, or NAME: WORD"),
        ("model: vit_tiny\ninput_size: large", "--input_size"),
        ("model: [", "not YAML"),
        ("- model", "must be NAME: VALUE lines"),
        ("base: own.yaml", "is its own base"),
    ],
)
def test_students_that_are_none(recipes, text, reason):
    (recipes / "own.yaml").write_text(text)
    assert reason in refused("own.yaml", read_student)


def test_without_pyyaml_it_says_what_to_install(recipes, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert 'pip install "weight-selection[train]"' in refused("flat.yaml")
