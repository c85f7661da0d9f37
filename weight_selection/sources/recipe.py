"""Recipes: YAML files with the options of main.py, of which ``--student_config`` takes the student. Imports no torch.

A plain recipe is a list of ``option: value`` lines. A recipe with ``sections`` holds several, such as one per data set:

    model: vit_tiny  # the lines above the sections count in each of them
    lr: 2.0e-3
    sections:
      cifar100: {data_set: CIFAR100}
      flowers: {data_set: flowers, epochs: 600}

``vit_tiny.yaml:flowers`` names the second section. ``base`` names what a recipe or a section starts from, later ones
over earlier ones: sections of the same file, or FILE or FILE:SECTION relative to it. ``about`` is no option but a text
for people: the command, the hours it takes, the accuracy to expect.
"""

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weight_selection.arguments import Kwargs, Parser, did_you_mean
from weight_selection.errors import InputError
from weight_selection.files import Damaged, read_text

SIZE_LIMIT = 1 << 20  # bytes of a recipe
MOVED = "moved.yaml"  # in a directory of recipes: {path of a recipe that stood there: its path now}, relative to it
STUDENT_OPTIONS = ("model", "model_kwargs", "input_size")
INPUT_SIZE = 224  # pixels; main.py's, where a recipe gives none


def _print_to_stderr(line):
    print(line, file=sys.stderr)


def read_recipe(
    path: str, option: str, on_moved: Callable[[str], object] = _print_to_stderr, known: set | None = None
) -> dict[str, list[str]]:
    """Read a recipe over all that it is based on.

    Args:
        path: FILE or FILE:SECTION. A file of exactly this name wins, even if the name contains a colon. If there is no
            such file, ``moved.yaml`` may say where it is now, and ``A/B.yaml`` is read as ``A.yaml:B``.
        option: the command-line option that named it, for errors.
        on_moved: is called with one line of text for each path that is read from somewhere else.
        known: names of main.py's options, to refuse others; None: whether main.py has such options is not checked.

    Returns:
        {name of an option: its words as on the command line}.

    Raises:
        InputError: a file cannot be read or is no recipe, a section is unknown or missing, a recipe is its own base.
    """
    words = {}
    for key, value in _Reader(option, on_moved).read(Path(path), ()).items():
        if known is not None and key not in known:
            raise InputError(f"{option} {path}: {key} is not an option of main.py{did_you_mean(key, known)}")
        if isinstance(value, dict):
            value = [f"{name}={item}" if isinstance(item, str) else None for name, item in value.items()]
        words[key] = value if isinstance(value, list) else [value]
        if not all(isinstance(word, str) for word in words[key]):
            raise InputError(f"{option} {path}: {key} must be a word, a list of words, or NAME: WORD lines")
    return words


def read_student(path: str, option: str) -> tuple[str, dict, int]:
    """The model that a recipe trains: its name, its arguments, and the side of its input in pixels.

    Raises:
        InputError: as ``read_recipe``; or the recipe has no model, or one of the three cannot be used.
    """
    words = read_recipe(path, option)
    for key in words.keys() - STUDENT_OPTIONS:
        if close := difflib.get_close_matches(key, STUDENT_OPTIONS, 1, 0.75):
            raise InputError(f"{option} {path}: {key} is not an option of main.py; did you mean {close[0]}?")
    if "model" not in words:
        raise InputError(f"{option} {path}: has no model; name one, such as model: vit_tiny")
    parser = Parser("main.py", "The student of a recipe.")
    parser.add_argument("--model")
    parser.add_argument("--model_kwargs", nargs="*", default={}, action=Kwargs)
    parser.add_argument("--input_size", type=int, default=INPUT_SIZE)
    student = parser.parse_args([word for key in STUDENT_OPTIONS if key in words for word in (f"--{key}", *words[key])])
    return student.model, student.model_kwargs, student.input_size


@dataclass(frozen=True)
class _Reader:
    """Reads recipes and their bases.

    ``above`` are the recipes that led to one by their ``base``: for each, (path, (file, section)).
    """

    option: str
    on_moved: Callable[[str], object]

    def read(self, path: Path, above: tuple) -> dict:
        """The entries of FILE or FILE:SECTION over those of its bases."""
        where = self._where(path, above)
        file, section = self._locate(path)
        content = _read_yaml(file, where)
        sections = content.pop("sections", None)
        if sections is not None and not (isinstance(sections, dict) and sections):
            raise InputError(f"{where}: sections must be NAME: RECIPE lines")
        if sections is not None and section is None:
            raise InputError(
                f"{where}: name a section, as in {file}:{next(iter(sections))}; it has {', '.join(sections)}"
            )
        if section is not None and section not in (sections or {}):
            raise InputError(f"{where}: no section {section}; {file} has {', '.join(sections or ['none'])}")
        below = self._check_bases(path, file, section, above)
        shared = self._over_bases(content, file, {}, below)
        return shared if section is None else shared | self._over_bases(sections[section], file, sections, below)

    def _over_bases(self, entries, file: Path, sections: dict, above: tuple) -> dict:
        """``entries`` of a file, or of a section of it, over those of the recipes that their ``base`` names."""
        where = self._where(above[-1][0], above[:-1])
        entries = entries or {}  # NAME: with nothing behind it
        if not isinstance(entries, dict):
            raise InputError(f"{where}: a section must be NAME: VALUE lines")
        bases = entries.get("base", [])
        merged = {}
        for base in bases if isinstance(bases, list) else [bases]:
            if not isinstance(base, str):
                raise InputError(f"{where}: base must be a file or a list of files")
            if base in sections:
                below = self._check_bases(Path(f"{file}:{base}"), file, base, above)
                merged |= self._over_bases(sections[base], file, sections, below)
            else:
                merged |= self.read(file.parent / base, above)
        return merged | {key: value for key, value in entries.items() if key not in ("base", "about")}

    def _check_bases(self, path: Path, file: Path, section: str | None, above: tuple) -> tuple:
        """``above`` with this recipe, which must not be in there already."""
        place = (file.resolve(), section)
        if place in [other for _, other in above]:
            raise InputError(f"{self._where(path, above)}: is its own base")
        return (*above, (path, place))

    def _where(self, path: Path, above: tuple) -> str:
        return f"{self.option} {path}" + (f", a base of {above[-1][0]}" if above else "")

    def _locate(self, path: Path) -> tuple[Path, str | None]:
        """The file that a path means, and the section or None."""
        if path.is_file():
            return path, None
        if moved := _moved(path):
            self.on_moved(f"{path} is now {moved}, which is read")
            path = moved
        file, _, section = str(path).rpartition(":")
        return (Path(file), section) if file and section and os.sep not in section else (path, None)


def _moved(path: Path) -> Path | None:
    """Where a recipe is now that is not at ``path``; None if nothing is known of it."""
    for directory in path.parents[:2]:
        if (directory / MOVED).is_file():
            table = _read_yaml(directory / MOVED, str(directory / MOVED))
            if isinstance(now := table.get(path.relative_to(directory).as_posix()), str):
                return Path(os.path.normpath(directory / now))
    merged = path.parent.with_name(f"{path.parent.name}.yaml") if path.parent.name else None
    return Path(f"{merged}:{path.stem}") if path.suffix == ".yaml" and merged and merged.is_file() else None


def _read_yaml(path: Path, where: str) -> dict:
    """The lines of a YAML file, each value as the text it would be on the command line."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        remedy = 'python -m pip install "weight-selection[train]"'
        raise InputError(f"{where}: PyYAML is needed to read it; run: {remedy}") from error

    class Loader(yaml.BaseLoader):
        """Refuses a name that stands twice in one place, of which YAML would take the last."""

        def construct_mapping(self, node, deep=False):
            mapping, names = super().construct_mapping(node, deep), [name.value for name, _ in node.value]
            if len(mapping) < len(names):
                twice = next(name for name in mapping if names.count(name) > 1)
                raise yaml.YAMLError(f"{twice} stands twice in the same place; leave one of them out")
            return mapping

    try:
        content = yaml.load(read_text(path, SIZE_LIMIT), Loader)
    except Damaged as error:
        raise InputError(f"{where}: cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: must be NAME: VALUE lines")
    return content
