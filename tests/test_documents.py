"""Documents: their links lead somewhere, and the files that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]
ROOMS = "weight_selection|training|distributed|input_pipeline|models|recipes|scripts|experiments|benchmarks|tests|docs"
FILE = re.compile(rf"(?<![\w./-])((?:{ROOMS})/[\w./-]*\w\.(?:py|sh|yaml|md|png))(?!\w)")
OTHERS = re.compile(r"tableNN|recipes/vit_tiny/cifar100\.yaml")  # a pattern, and a path of earlier versions

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(document):
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


@documents
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        if not path.startswith("https://") and not path.startswith("http://"):
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@documents
def test_files_that_are_named_exist(document):
    if document.name == "CHANGELOG.md":
        pytest.skip("names files of earlier versions")
    names = set(FILE.findall(OTHERS.sub("", document.read_text())))
    assert not [name for name in sorted(names) if not (ROOT / name).exists()]


def test_the_tree_of_the_readme_has_every_directory_and_program():
    tree = (ROOT / "README.md").read_text().split("## The repository")[1].split("```")[1]
    rooms = {f"{path.parent.relative_to(ROOT).parts[0]}/" for path in ROOT.glob("[a-z]*/**/*.py") if path.is_file()}
    rooms -= {"build/"}  # pip's
    programs = {path.name for path in ROOT.glob("*.py")}
    assert not [name for name in rooms | programs if not re.search(rf"^{name}|  {name}", tree, flags=re.MULTILINE)]
