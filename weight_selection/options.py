"""The options of a selection and their checks. Imports no torch, so that a command is checked before torch loads."""

import os
from dataclasses import dataclass
from numbers import Integral

from weight_selection.arguments import did_you_mean
from weight_selection.errors import InputError
from weight_selection.files import check_directory
from weight_selection.sources import COMPONENTS

LAYER_SELECTION = ("first_n", "mid_n", "last_n", "uniform", "quadratic")  # the last one goes beyond the paper
CONSISTENT = ("uniform", "consecutive", "random")  # they keep the same neurons in every tensor
PER_TENSOR = ("random_inconsistent", "l1", "magnitude")  # they choose anew in every tensor
ELEMENT_SELECTION = CONSISTENT + PER_TENSOR
PROJECTION = ("project", "greedy")  # beyond the paper: weights that are fitted to the teacher's activations
SEEDED = ("random", "random_inconsistent")  # the rules of ELEMENT_SELECTION that the seed changes
PARTS, WHOLE = FUSED_QKV = ("parts", "whole")  # of q, k and v: over which uniform selection spreads its indices
MOST_SEED = 2**63 - 1  # that PyTorch takes
CALIBRATION_IMAGES = 1024
HELD_OUT_IMAGES = 64  # drawn beside these, to compare the student with its teacher
KEEP = "keep"
DTYPES = ("float32", "float16", "bfloat16", KEEP)  # of written values; KEEP is the teacher's
NOISE = "noise"  # in place of a directory of images


@dataclass(frozen=True)
class SelectionOptions:
    """The options of one selection.

    ``select_weights`` explains each field at its argument of the same name. Only Python can give tensors as the
    calibration. Errors name options of the command line; ``errors.in_python`` translates them for ``select_weights``.
    """

    layer_selection: str = "first_n"
    element_selection: str = "uniform"
    exclude: tuple = ()
    include_head: bool = False
    include_head_norm: bool = False
    allow_unused: bool = False
    seed: int = 0
    calibration: object = None
    calibration_images: int | None = None
    calibration_size: int | None = None
    classifier: tuple | None = None
    fused_qkv: str = PARTS

    @property
    def selects_all(self) -> bool:
        """Whether the classifier is selected too."""
        return self.include_head or (self.classifier is not None and not self.classifier)

    @property
    def projects(self) -> bool:
        """Whether weights are fitted, and not selected."""
        return self.element_selection in PROJECTION

    def check(self, plan_only: bool = False) -> None:
        """Raise InputError if an option is unknown, has no effect or contradicts another.

        Args:
            plan_only: only the plan is wanted, which needs no images.
        """
        _choose("--layer_selection", self.layer_selection, LAYER_SELECTION)
        _choose("--element_selection", self.element_selection, ELEMENT_SELECTION + PROJECTION)
        if not isinstance(self.exclude, (tuple, list)):
            raise InputError(f"--exclude {self.exclude}: give a list of components, such as ['norm']")
        for component in self.exclude:
            _choose("--exclude", component, COMPONENTS)
        _choose("--fused_qkv", self.fused_qkv, FUSED_QKV)
        if self.fused_qkv == WHOLE and self.element_selection != "uniform":
            raise InputError(
                f"--fused_qkv whole: has no effect with --element_selection {self.element_selection}; leave it out"
            )
        if self.include_head and self.include_head_norm:
            raise InputError("--include_head_norm: --include_head selects the normalisation too; leave one out")
        if self.include_head and self.classifier is not None:
            raise InputError("--include_head: --classifier says already what is left out; leave one out")
        if not isinstance(self.seed, Integral) or isinstance(self.seed, bool) or not 0 <= self.seed <= MOST_SEED:
            raise InputError(f"--seed {self.seed}: give a whole number from 0 to {MOST_SEED}")
        self._check_calibration(plan_only)

    def _check_calibration(self, plan_only):
        for name in ("calibration", "calibration_images", "calibration_size"):
            value = getattr(self, name)
            if value is not None and not self.projects:
                shown = value if isinstance(value, (str, int, os.PathLike)) else f"of {type(value).__name__}"
                raise InputError(
                    f"--{name} {shown}: has no effect with --element_selection {self.element_selection}; leave it out, "
                    f"or choose {' or '.join(PROJECTION)}"
                )
        if not self.projects:
            return
        if self.calibration is None and not plan_only:
            raise InputError(
                f"--calibration is missing: --element_selection {self.element_selection} needs a directory of images "
                f"(any, without labels; those of the task are best), or {NOISE}"
            )
        if self.exclude:
            raise InputError(
                f"--exclude {self.exclude[0]}: {self.element_selection} fits layers to what those before them give, "
                "which must not be random; leave it out, or select by another rule"
            )
        if isinstance(self.calibration, (str, os.PathLike)) and str(self.calibration) != NOISE:
            check_directory(self.calibration, "--calibration", f"name one of images, or {NOISE}")
        for name, unit in (("calibration_images", ""), ("calibration_size", " of pixels")):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} {value}: give a number{unit} from 1 up")


def _choose(option, value, choices):
    if value not in choices:
        raise InputError(f"{option} {value}: choose one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
