#!/usr/bin/env python3
"""Count the pairs of models of which the smaller can be selected from the larger; writes docs/coverage.md.

    python scripts/coverage.py [--libraries timm torchvision transformers] [--output docs/coverage.md] [--examples]

Every model of timm and of torchvision, and Hugging Face's of published sizes, is built on the meta device, so nothing
is downloaded and no weight exists. Every pair of the same architecture that differs in its number of parameters is
planned. A plan fills every key of the student but the classifier's. timm takes a quarter of an hour on two cores, the
others minutes.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import timm
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from published_configs import CONFIGS, build
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program
from weight_selection.files import check_writable, new_file
from weight_selection.options import SelectionOptions
from weight_selection.plan import Plan, plan_selection
from weight_selection.sources.facts import facts_of
from weight_selection.sources.names import create_model
from weight_selection.structure import ModelStructure, structure_of

# Kinds of refusals, by what their messages say; the first that matches.
REASONS = {
    "the student has other tensors": r"the teacher has no|the student has layers there",
    "the teacher has other tensors": r"the student has no such tensor",
    "the student is wider": r"at least as wide|as large in both",
    "the student is deeper": r"at least as deep",
    "layers of other kinds": r"layers are of",
    "another number of prefix tokens": r"prefix tokens",
    "another vocabulary or number of positions": r"never subsampled",
    "kernels or positions of other sizes": r"positions, not neurons|positions overlap|can be adapted|are no weights",
    "sizes that must be the same": r"must be the same",
    "neurons in other parts or blocks": r"made of|blocks|elsewhere in the student",
    "a tensor that is not used": r"does not use it",
    "another kind of tensor": r"not the same kind",
}


def torchvision_names() -> list:
    """Names of torchvision's models that classify images."""
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models(module=models)]


ON_META = partial(create_model, device="meta")  # for the models that the command of selection knows by name
LIBRARIES = {  # of each, what gives the names of its models, and what builds the model of a name on the meta device
    "timm": (timm.list_models, ON_META),
    "torchvision": (torchvision_names, ON_META),
    "transformers": (CONFIGS.keys, build),
}

LOSSES = ("the teacher has other tensors", "another number of prefix tokens")  # which --allow_unused accepts


@dataclass
class Coverage:
    """What was counted of the models of one architecture.

    Attributes:
        name: of the architecture.
        models: number of its models.
        planned: number of pairs.
        unused: number of pairs that are planned with ``--allow_unused`` only.
        refused: {reason: number of the other pairs}.
        examples: {reason: one refusal}.
    """

    name: str
    models: int
    planned: int = 0
    unused: int = 0
    refused: Counter = field(default_factory=Counter)
    examples: dict = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """Number of all pairs."""
        return self.planned + self.unused + self.refused.total()

    def row(self) -> str:
        """The architecture's row in the table of docs/coverage.md."""
        reasons = "; ".join(f"{reason} {count}" for reason, count in self.refused.most_common())
        return f"| {self.name} | {self.models} | {self.pairs} | {self.planned} | {self.unused} | {reasons} |"


def reason_of(message: str) -> str:
    """The kind of a refusal."""
    if "cannot take a" in message:
        why = re.sub(r"^in \S+: ", "", message.split(" apart: ")[1])
        return "not taken apart: " + re.sub(r"its forward pass of .* images fails.*", "its forward pass fails", why)
    fitting = (reason for reason, pattern in REASONS.items() if re.search(pattern, message))
    return next(fitting, "another reason")


def describe(names: list, library: str = "timm") -> list:
    """[(number of parameters, name, structure or the refusal to take it apart)] of models, smallest first."""
    _, create = LIBRARIES[library]
    models = []
    for name in names:
        model = create(name)
        try:
            found = structure_of(model, name)
        except InputError as refusal:
            found = refusal
        models.append((sum(parameter.numel() for parameter in model.parameters()), name, found))
    return sorted(models, key=lambda item: item[:2])


def pairs(models: list) -> Iterator[tuple[tuple, tuple]]:
    """Of what ``describe`` gives, every two of different sizes: ((name, structure) of the student, of the teacher)."""
    for small, large in combinations(models, 2):
        if small[0] < large[0]:
            yield small[1:], large[1:]


def plan_pair(teacher: ModelStructure, student: ModelStructure, **options) -> Plan:
    """``plan_selection``; raises the refusal where one of the two could not be taken apart."""
    for found in (student, teacher):
        if isinstance(found, InputError):
            raise found
    return plan_selection(teacher, student, SelectionOptions(**options))


def count(architecture: str, names: list, library: str) -> Coverage:
    """Plan all pairs of the models of an architecture."""
    torch.set_num_threads(1)
    counted = Coverage(architecture, len(names))
    for (small, student), (large, teacher) in pairs(describe(names, library)):
        try:
            try:
                plan = plan_pair(teacher, student)
                counted.planned += 1
            except InputError as refusal:
                if reason_of(str(refusal)) not in LOSSES:
                    raise
                plan = plan_pair(teacher, student, allow_unused=True)
                counted.unused += 1
        except InputError as refusal:
            reason = reason_of(str(refusal))
            counted.refused[reason] += 1
            counted.examples.setdefault(reason, f"{small} from {large}: {refusal}")
            continue
        assert [entry.key for entry in plan.entries] == list(student.shapes), f"{small} from {large}: not every key"
    return counted


def models_by_architecture(library: str = "timm") -> dict:
    """{architecture: names of all of a library's models of it}, the one with most models first."""
    names, create = LIBRARIES[library]
    models = {}
    for name in names():
        models.setdefault(facts_of(create(name)).architecture.name, []).append(name)
    return dict(sorted(models.items(), key=lambda item: -len(item[1])))


INTRODUCTION = """# Which small models can be selected from which large ones

`python scripts/coverage.py --output docs/coverage.md` planned every pair of models of a library that have the same
architecture and differ in their number of parameters. It needs no weights. `--libraries NAME` counts one library again.

- *planned*: every tensor of the smaller model but the classifier has its place in the larger one.
- *with `--allow_unused`*: the same, but the larger model has tensors that the smaller one has no place for (a
  LayerScale, another token).
- *refused*: all other pairs, counted by reason. In most pairs of an architecture the smaller model is not a narrower or
  shallower version of the larger one.
"""


def section(library: str, counted: list) -> str:
    """What was counted in one library, as a section of docs/coverage.md."""
    total = Coverage("all", sum(one.models for one in counted))
    for one in counted:
        total.planned += one.planned
        total.unused += one.unused
        total.refused += one.refused
    rows = "\n".join(one.row() for one in [*counted, total])
    return f"""## {library} {version(library)}, PyTorch {torch.__version__}

| architecture | models | pairs | planned | with `--allow_unused` | refused |
|---|---|---|---|---|---|
{rows}
"""


def with_sections(text: str, new: list) -> str:
    """docs/coverage.md with new sections in the place of those of the same libraries; the proofs stay last."""
    found = {part.split()[0]: f"## {part}".strip() + "\n" for part in text.split("\n## ")[1:]}
    found |= {part.split()[1]: part for part in new}
    last = [name for name in found if name not in LIBRARIES]
    order = [*(library for library in LIBRARIES if library in found), *last]
    return "\n".join([INTRODUCTION, *(found[name] for name in order)])


def count_library(library: str, chosen: list | None, processes: int) -> list:
    """Count the architectures of a library, or those that are chosen."""
    models = models_by_architecture(library)
    unknown = [name for name in chosen or () if name not in models]
    if unknown:
        raise InputError(f"--families {unknown[0]}: no such architecture; choose of {', '.join(sorted(models))}")
    models = {name: names for name, names in models.items() if chosen is None or name in chosen}
    with ProcessPoolExecutor(processes) as pool:
        counted = pool.map(count, models, models.values(), [library] * len(models))
        return list(tqdm(counted, total=len(models), unit="architecture", file=sys.stderr))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("coverage.py", "Count the pairs of models of which the smaller can be selected from the larger.")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="only these")
    parser.add_argument("--output", metavar="FILE", help="replace these libraries' tables there; else they are printed")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these architectures; not with --output")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--examples", action="store_true", help="print an example of each refusal")
    args = parser.parse_args(argv)
    if args.output is not None:
        check_writable(Path(args.output).parent, "--output")
    if args.families is not None and (len(args.libraries) > 1 or args.output is not None):
        raise InputError(f"--families {args.families[0]}: leave --output out and name one of --libraries")
    sections = []
    for library in args.libraries:
        counted = count_library(library, args.families, args.processes)
        for one in counted if args.examples else ():
            for reason, example in one.examples.items():
                print(f"{one.name}, {reason}: {example}")
        sections.append(section(library, counted))
    if args.output is None:
        print("\n".join(sections))
        return
    path = Path(args.output)
    old = path.read_text() if path.is_file() else ""
    with new_file(path) as file:
        file.write_text(with_sections(old, sections))


if __name__ == "__main__":
    run_program("coverage.py", main)
