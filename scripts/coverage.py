#!/usr/bin/env python3
"""Count the pairs of timm models of which the smaller can be selected from the larger; writes docs/coverage.md.

    python scripts/coverage.py [--output docs/coverage.md] [--families resnet vgg] [--examples]

Every model of timm is built on the meta device, so nothing is downloaded and no weight exists. Every pair of the same
architecture that differs in its number of parameters is planned. A plan fills every key of the student but the
classifier's. This takes a quarter of an hour on two cores.
"""

import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import timm
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program
from weight_selection.files import check_writable, new_file
from weight_selection.options import SelectionOptions
from weight_selection.plan import plan_selection, structure_of
from weight_selection.sources.facts import facts_of
from weight_selection.sources.timm_models import create_model

# Kinds of refusals, by what their messages say; the first that matches.
REASONS = {
    "the student has other tensors": r"the teacher has no|the student has layers there",
    "the teacher has other tensors": r"the student has no such tensor",
    "the student is wider": r"< student's|as large in both",
    "the student is deeper": r"at least as deep",
    "layers of other kinds": r"layers are of",
    "another number of prefix tokens": r"prefix tokens",
    "kernels or positions of other sizes": r"positions, not neurons|their positions overlap|can be adapted",
    "sizes that must be the same": r"must be the same",
    "neurons in other parts or blocks": r"made of|blocks|elsewhere in the student",
    "a tensor that is not used": r"does not use it",
    "another kind of tensor": r"not the same kind",
}

LOSSES = ("the teacher has other tensors", "another number of prefix tokens")  # which --allow_unused accepts


@dataclass
class Family:
    """What was counted.

    Attributes:
        name: of the family.
        models: number of architectures.
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
    def pairs(self):
        return self.planned + self.unused + self.refused.total()

    def row(self):
        reasons = "; ".join(f"{reason} {count}" for reason, count in self.refused.most_common())
        return f"| {self.name} | {self.models} | {self.pairs} | {self.planned} | {self.unused} | {reasons} |"


def reason_of(message: str) -> str:
    """The kind of a refusal."""
    if "cannot take a" in message:
        why = re.sub(r"^in \S+: ", "", message.split(" apart: ")[1])
        return "not taken apart: " + re.sub(r"its forward pass of .* images fails.*", "its forward pass fails", why)
    return next(reason for reason, pattern in REASONS.items() if re.search(pattern, message))


def describe(names: list) -> list:
    """[(number of parameters, name, structure or the refusal to take it apart)] of architectures, smallest first."""
    models = []
    for name in names:
        model = create_model(name, device="meta")
        try:
            found = structure_of(model, name)
        except InputError as refusal:
            found = refusal
        models.append((sum(parameter.numel() for parameter in model.parameters()), name, found))
    return sorted(models, key=lambda item: item[:2])


def pairs(models: list):
    """Of what ``describe`` gives, every two of different sizes: ((name, structure) of the student, of the teacher)."""
    for small, large in combinations(models, 2):
        if small[0] < large[0]:
            yield small[1:], large[1:]


def plan_pair(teacher, student, **options) -> list:
    """``plan_selection``; raises the refusal where one of the two could not be taken apart."""
    for found in (student, teacher):
        if isinstance(found, InputError):
            raise found
    return plan_selection(teacher, student, SelectionOptions(**options))


def count(name: str, architectures: list) -> Family:
    """Plan all pairs of a family."""
    torch.set_num_threads(1)
    family = Family(name, len(architectures))
    for (small, student), (large, teacher) in pairs(describe(architectures)):
        try:
            try:
                plan = plan_pair(teacher, student)
                family.planned += 1
            except InputError as refusal:
                if reason_of(str(refusal)) not in LOSSES:
                    raise
                plan = plan_pair(teacher, student, allow_unused=True)
                family.unused += 1
        except InputError as refusal:
            reason = reason_of(str(refusal))
            family.refused[reason] += 1
            family.examples.setdefault(reason, f"{small} from {large}: {refusal}")
            continue
        assert [entry.key for entry in plan] == list(student.shapes), f"{small} from {large}: not every key"
    return family


def architectures_by_family() -> dict:
    """{family: names of all of timm's architectures in it}, the largest family first."""
    families = {}
    for name in timm.list_models():
        families.setdefault(facts_of(create_model(name, device="meta")).architecture.name, []).append(name)
    return dict(sorted(families.items(), key=lambda item: -len(item[1])))


def report(families: list) -> str:
    """The text of docs/coverage.md."""
    total = Family("all", sum(family.models for family in families))
    for family in families:
        total.planned += family.planned
        total.unused += family.unused
        total.refused += family.refused
    rows = "\n".join(family.row() for family in [*families, total])
    return f"""# Which small models can be selected from which large ones

`python scripts/coverage.py --output docs/coverage.md` planned every pair of timm's models that have the same
architecture and differ in their number of parameters (timm {timm.__version__}, PyTorch {torch.__version__}). It
needs no weights.

- *planned*: every tensor of the smaller model but the classifier has its place in the larger one.
- *with `--allow_unused`*: the same, but the larger model has tensors that the smaller one has no place for (a
  LayerScale, another token).
- *refused*: all other pairs, counted by reason. Most pairs of an architecture are no narrower or shallower versions of
  each other.

| architecture | models | pairs | planned | with `--allow_unused` | refused |
|---|---|---|---|---|---|
{rows}
"""


def main(argv=None) -> None:
    parser = Parser("coverage.py", "Count the pairs of timm models of which the smaller can be selected.")
    parser.add_argument("--output", metavar="FILE", help="write the table there, replacing it; else it is printed")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--examples", action="store_true", help="print an example of each refusal")
    args = parser.parse_args(argv)
    if args.output is not None:
        check_writable(Path(args.output).parent, "--output")
    families = architectures_by_family()
    unknown = [name for name in args.families or () if name not in families]
    if unknown:
        raise InputError(f"--families {unknown[0]}: no such family; choose of {', '.join(sorted(families))}")
    chosen = {name: names for name, names in families.items() if args.families is None or name in args.families}
    with ProcessPoolExecutor(args.processes) as pool:
        counted = pool.map(count, chosen, chosen.values())
        counted = list(tqdm(counted, total=len(chosen), unit="family", file=sys.stderr))
    for family in counted if args.examples else ():
        for reason, example in family.examples.items():
            print(f"{family.name}, {reason}: {example}")
    text = report(counted)
    if args.output is None:
        print(text)
    else:
        with new_file(args.output) as file:
            file.write_text(text)


if __name__ == "__main__":
    run_program("coverage.py", main)
