"""The options of main.py: one row for each, from which the parser and all checks follow. Imports no torch."""

import argparse
import copy
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from datasets import DATA_SETS
from distributed.program import find_launch
from models import SCHEMES
from weight_selection.arguments import Kwargs, Parser, boolean, check_kwargs, one_of
from weight_selection.errors import InputError
from weight_selection.files import check_no_file
from weight_selection.sources.directories import files_of
from weight_selection.sources.names import TIMM, check_name
from weight_selection.sources.recipe import INPUT_SIZE, read_recipe


class Options(SimpleNamespace):
    """The values of all options of main.py, as attributes. They cannot be changed; ``replace`` makes a changed copy."""

    def __setattr__(self, name, *value):
        raise AttributeError(f"options cannot be changed: use options.replace({name}=...)")

    __delattr__ = __setattr__

    def replace(self, **changes) -> "Options":
        """A copy of these options with some values changed; TypeError for a name that is no option's."""
        if unknown := changes.keys() - vars(self).keys():
            raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
        return Options(**vars(self) | changes)

    def plain(self) -> dict:
        """{name: value} of all options in the types that JSON has, sorted by name, for checkpoints and JSON files."""
        return json.loads(json.dumps(vars(self), sort_keys=True))


def mixes(args: Options) -> bool:
    """Whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


@dataclass(frozen=True)
class Range:
    """The values that an option may have."""

    holds: Callable[[float], bool]  # whether a value is among them
    words: str  # what to give, for the error


@dataclass(frozen=True)
class Need:
    """A condition under which an option has an effect."""

    met: Callable[[Options], bool]  # tells whether options meet the condition
    otherwise: str  # for the error: the options that do not meet it; {name} stands for the value of an option
    always: bool = False  # if it is not met, refuse the option in a --config file too, not only on the command line


@dataclass(frozen=True)
class Option:
    """All that is to be known about one option.

    Attributes:
        may_change_on_resume: a run may go on with another value than it was started with. These are options of the
            machine and of what is kept, not of the experiment. The result may still differ.
        cannot_change_result: two runs that differ only in this option have the same weights, log and accuracies to the
            last bit. (For a path: if the same data lie there.)
    """

    name: str  # without dashes
    type: type  # of its value; on the command line, dict is written NAME=VALUE ..., and bool true, false or not at all
    default: object  # where neither the command line nor --config gives a value; None: the program decides
    help: str  # a line for --help
    aliases: tuple[str, ...] = ()  # other ways to write it, with dashes
    choices: tuple | None = None  # like nargs and metavar, as ``argparse`` takes it
    nargs: int | str | None = None
    metavar: str | None = None
    ranges: tuple[Range, ...] = ()  # each refuses values in its own words; None is in every range
    needs: tuple[Need, ...] = ()  # the option is refused on the command line if one of these is not met
    set_by: dict[str, str] = field(default_factory=dict)  # {argument of a model: option that sets it}, of a dict
    may_change_on_resume: bool = False
    cannot_change_result: bool = False


# What an option names, by its metavar. An empty text, which a shell's unset variable gives, is refused for all of them.
NAMED = {"DIR": "a directory", "FILE": "a file", "PATH": "a file or directory", "NAME": "a name"}

FREE = {"may_change_on_resume": True}
NEUTRAL = FREE | {"cannot_change_result": True}

FROM_1 = (Range(lambda value: value >= 1, "a number from 1 up"),)
FROM_0 = (Range(lambda value: 0 <= value < math.inf, "a number from 0 up"),)
FROM_0_TO_1 = (Range(lambda value: 0 <= value <= 1, "a number from 0 to 1"),)
ABOVE_0 = (Range(lambda value: value > 0, "a number above 0, or leave it out"),)
ABOVE_0_UP_TO_1 = (Range(lambda value: 0 < value <= 1, "a number above 0 and up to 1"),)
FINITE = (Range(math.isfinite, "a number"),)
SHARES = (Range(lambda pair: 0 < pair[0] <= pair[1] <= 1, "two numbers above 0 and up to 1, the smaller first"),)
BOUNDS = (Range(lambda pair: 0 <= pair[0] < pair[1] <= 1, "two numbers from 0 to 1, the smaller first"),)
FOUR_MONTHS = (Range(lambda seconds: seconds <= 1e7, "a number up to 1e7, which is four months"),)

DATA_FILES = Need(lambda args: DATA_SETS[args.data_set].layout is not None, "--data_set {data_set}", always=True)
CLASS_FOLDERS = Need(lambda args: DATA_SETS[args.data_set].folders, "--data_set {data_set}", always=True)
TRAINING = Need(lambda args: not args.eval, "--eval true")
FIRST_WEIGHTS = Need(lambda args: args.eval or not (args.finetune or args.resume), "--finetune or --resume")
WEIGHT_FILE = Need(lambda args: args.finetune or args.initialize, "no --finetune or --initialize")
TRAINED_FEATURES = Need(lambda args: not args.linear_probe, "--linear_probe true")
NO_SCALE = Need(lambda args: args.head_init_scale == 1, "--head_init_scale {head_init_scale}")
MODEL_EMA = Need(lambda args: args.model_ema, "--model_ema false")
DISTILLATION = Need(lambda args: args.distillation != "none", "--distillation none")
WEIGHT_DECAY = Need(lambda args: args.weight_decay != 0, "--weight_decay 0")
EPOCHS_OF_WARMUP = Need(lambda args: args.warmup_steps < 0, "--warmup_steps")
NO_TOTAL = Need(lambda args: args.total_batch_size is None, "--total_batch_size, which sets it")
NO_POLICY = Need(lambda args: args.aa == "none", "--aa {aa}")
ERASING = Need(lambda args: args.reprob != 0, "--reprob 0")
MIXING = Need(mixes, "--mixup 0 --cutmix 0")
NO_MINMAX = Need(lambda args: args.cutmix_minmax is None, "--cutmix_minmax")
USE_AMP = Need(lambda args: args.use_amp, "--use_amp false")
EVALUATION = Need(lambda args: not args.disable_eval, "--disable_eval true")
OUTPUT = Need(lambda args: args.output_dir is not None, "no --output_dir")
CHECKPOINTS = Need(lambda args: args.save_ckpt, "--save_ckpt false")
WANDB = Need(lambda args: args.enable_wandb, "--enable_wandb false")

# fmt: off
TABLE = {  # the rows, by their group in --help
    None: (
        Option("config", str, None, "YAML file of options; those on the command line win", metavar="FILE", **NEUTRAL),
        # Another machine may share the total out in another way; mixup then draws for other micro-batches.
        Option("batch_size", int, 64, "images in a process's micro-batch; with --total_batch_size it may be smaller",
               ranges=FROM_1, **FREE),
        Option("update_freq", int, 1, "micro-batches per step: gradient accumulation", ranges=FROM_1, needs=(NO_TOTAL,),
               **FREE),
        Option("total_batch_size", int, None,
               "images per step over all processes; micro-batch and accumulation follow from it"),
        Option("epochs", int, 300, "passes over the training images", ranges=FROM_1),
    ),
    "model": (
        Option("model", str, "vit_tiny",
               "a model of the paper, any timm name, hf-hub:ORG/NAME, timm/NAME or local-dir:DIR", metavar="NAME"),
        Option("model_kwargs", dict, {}, "arguments of the model, such as embed_dim=96",
               set_by={"num_classes": "--data_set", "drop_path_rate": "--drop_path", "img_size": "--input_size"}),
        Option("drop_path", float, 0.0, "stochastic depth", metavar="RATE", ranges=FROM_0_TO_1),
        Option("input_size", int, INPUT_SIZE, "side of the input in pixels", ranges=FROM_1),
        Option("layer_scale_init_value", float, 1e-6, "first value of ConvNeXt's LayerScale at random initialisation",
               ranges=FINITE),
        Option("head_init_scale", float, 1.0, "factor on the classifier's first weights", ranges=FINITE,
               needs=(TRAINED_FEATURES,)),
        Option("init", str, "timm", "random initialisation", choices=SCHEMES, needs=(FIRST_WEIGHTS,)),
        Option("classifier_init", str, "random",
               "first weights of the classifier; ridge: fitted to the features of the training images in closed form",
               choices=("random", "ridge"), needs=(TRAINING, TRAINED_FEATURES, NO_SCALE)),
        Option("initialize", str, None, "file that weight_selection.py wrote, or its directory", metavar="PATH"),
        Option("finetune", str, None, "weights of a trained model of this architecture", metavar="PATH"),
        Option("model_key", str, "model|module",
               "keys under which the --finetune or --initialize file may hold the weights, with | between them",
               needs=(WEIGHT_FILE,)),
        Option("linear_probe", bool, False, "train only a new classifier, on frozen features"),
        Option("model_ema", bool, False, "keep an exponential moving average of the weights"),
        Option("model_ema_decay", float, 0.9999, "how much of the average stays at every step", ranges=FROM_0_TO_1,
               needs=(MODEL_EMA,)),
        Option("model_ema_force_cpu", bool, False, "keep the average in CPU memory", needs=(MODEL_EMA,), **FREE),
        Option("model_ema_eval", bool, False, "evaluate the average after every epoch too", needs=(MODEL_EMA,)),
    ),
    "distillation": (
        Option("distillation", str, "none", "match the logits or the features of a teacher",
               choices=("none", "logit", "feature")),
        Option("distillation_alpha", float, 1.0, "weight of the distillation loss", metavar="A", ranges=FROM_0,
               needs=(DISTILLATION,)),
        Option("teacher", str, None, "name as for --model; not needed if main.py trained what --teacher_path names",
               metavar="NAME", needs=(DISTILLATION,)),
        Option("teacher_path", str, None, "the teacher's weights on disk; when not given, they come from the hub",
               metavar="PATH", needs=(DISTILLATION,)),
        Option("teacher_kwargs", dict, {}, "arguments of the teacher, such as embed_dim=384", needs=(DISTILLATION,),
               set_by={"num_classes": "--data_set", "img_size": "--input_size"}),
    ),
    "optimisation": (
        Option("opt", str, "adamw", "any optimiser of timm"),
        Option("opt_eps", float, 1e-8, "epsilon of the optimiser"),
        Option("opt_betas", float, None, "betas of the optimiser; when not given, its own defaults", nargs="+"),
        Option("momentum", float, 0.9, "momentum, for optimisers that have one"),
        Option("clip_grad", float, None, "largest gradient norm; no clipping when not given", metavar="NORM",
               ranges=ABOVE_0),
        Option("weight_decay", float, 0.05, "weight decay of matrices and kernels", ranges=FROM_0),
        Option("weight_decay_end", float, None, "weight decay at the end of a cosine schedule; constant when not given",
               ranges=FROM_0, needs=(WEIGHT_DECAY,)),
        Option("lr", float, 4e-3, "peak learning rate, used as it is for any batch size", ranges=FROM_0),
        Option("layer_decay", float, 1.0, "factor on the learning rate for each layer below the top",
               ranges=ABOVE_0_UP_TO_1, needs=(TRAINED_FEATURES,)),
        Option("min_lr", float, 1e-6, "learning rate at which the cosine ends", ranges=FROM_0),
        Option("warmup_epochs", int, None,
               "epochs in which the learning rate rises from 0 to its peak; when not given, a sixth and at most 50",
               ranges=FROM_0, needs=(EPOCHS_OF_WARMUP,)),
        Option("warmup_steps", int, -1, "steps of warm-up, in place of epochs; a negative number: count epochs"),
    ),
    "augmentation": (
        Option("color_jitter", float, 0.4, "strength of random changes of colour, with --aa none", ranges=FROM_0,
               needs=(NO_POLICY,)),
        Option("aa", str, "rand-m9-mstd0.5-inc1", "timm's auto-augment policy, or none", metavar="POLICY"),
        Option("smoothing", float, 0.1, "label smoothing", ranges=FROM_0_TO_1),
        Option("train_interpolation", str, "bicubic", "resampling of the random crop",
               choices=("random", "bilinear", "bicubic")),
        Option("scale", float, [0.08, 1.0], "smallest and largest area of the random crop", nargs=2, ranges=SHARES),
        Option("hflip", float, 0.5, "probability of a horizontal flip", ranges=FROM_0_TO_1),
        Option("crop_pct", float, None,
               "share of a test image's side that the centre crop keeps; when not given 224/256, or 1 from 384 pixels",
               ranges=ABOVE_0 + ABOVE_0_UP_TO_1),
        Option("reprob", float, 0.25, "random erasing: probability", ranges=FROM_0_TO_1),
        Option("remode", str, "pixel", "random erasing: what fills the rectangles", choices=("const", "rand", "pixel"),
               needs=(ERASING,)),
        Option("recount", int, 1, "random erasing: number of rectangles", ranges=FROM_1, needs=(ERASING,)),
        Option("mixup", float, 0.8, "mixup's alpha; 0: no mixup", metavar="ALPHA", ranges=FROM_0),
        Option("cutmix", float, 1.0, "cutmix's alpha; 0: no cutmix", metavar="ALPHA", ranges=FROM_0,
               needs=(NO_MINMAX,)),
        Option("cutmix_minmax", float, None, "bounds of the share of a side to cut, in place of --cutmix", nargs=2,
               ranges=BOUNDS),
        Option("mixup_prob", float, 1.0, "probability of mixup or cutmix", ranges=FROM_0_TO_1, needs=(MIXING,)),
        Option("mixup_switch_prob", float, 0.5, "probability of cutmix when both are on", ranges=FROM_0_TO_1,
               needs=(MIXING,)),
        Option("mixup_mode", str, "batch", "what shares a draw: a micro-batch, a pair of images, or no two images",
               choices=("batch", "pair", "elem"), needs=(MIXING,)),
    ),
    "data": (
        Option("data_set", str, "IMNET", "what to train and test on", choices=tuple(DATA_SETS)),
        Option("data_path", str, None, "directory of the data set", metavar="DIR", needs=(DATA_FILES,), **NEUTRAL),
        Option("eval_data_path", str, None, "class folders to test on; --data_path then has those to train on",
               metavar="DIR", needs=(CLASS_FOLDERS,), **NEUTRAL),
        Option("nb_classes", int, None, "number of classes; only compared with that of the data set",
               cannot_change_result=True),
        Option("imagenet_default_mean_and_std", bool, True,
               "normalise images by ImageNet's mean and deviation; false: by 0.5 and 0.5"),
        Option("num_workers", int, None,
               "loader processes; when not given 10, or this process's share of the cores if that is less",
               ranges=FROM_0, **NEUTRAL),
        Option("augment_device", bool, False, "augment on the device that trains, not in workers", **FREE),
        Option("cache_images", bool, False, "decode all images at the start and keep them in memory", **NEUTRAL),
        Option("pin_mem", bool, True, "load batches into memory that a GPU copies from faster", **NEUTRAL),
        Option("skip_bad_images", int, 0, "replace up to N damaged training images", metavar="N", ranges=FROM_0,
               needs=(TRAINING,), **FREE),
    ),
    "run": (
        Option("output_dir", str, None,
               "directory of the run, or with --eval of the report; without it nothing is written", metavar="DIR",
               **NEUTRAL),
        Option("log_dir", str, None, "directory of a TensorBoard log", metavar="DIR", needs=(TRAINING,), **NEUTRAL),
        Option("device", str, None, "where to compute; when not given, cuda if there is one", choices=("cuda", "cpu"),
               **FREE),
        Option("seed", int, 0, "seed of all random numbers", ranges=FROM_0),
        Option("deterministic", bool, False, "use only algorithms that give the same bits each time", **FREE),
        Option("compile", bool, False, "compile the model with torch.compile; if that fails, say so and go on without",
               needs=(TRAINING,), **FREE),
        Option("channels_last", bool, False, "memory layout in which convolutions on GPUs are faster", **FREE),
        Option("use_amp", bool, False, "mixed precision"),
        Option("amp_dtype", str, None, "type of mixed precision; when not given, float16 on cuda and bfloat16 on cpu",
               choices=("float16", "bfloat16"), needs=(USE_AMP,), **FREE),
        Option("eval", bool, False,
               "only evaluate the weights of --resume, --initialize or --finetune; a checkpoint names model and data",
               **FREE),
        # An evaluation draws no random numbers, but which epochs have one decides which epoch is the best.
        Option("disable_eval", bool, False, "evaluate after the last epoch only", **FREE),
        Option("eval_interval", int, 1, "epochs from one evaluation to the next", metavar="EPOCHS", ranges=FROM_1,
               needs=(EVALUATION,), **FREE),
        Option("eval_batch_size", int, None,
               "images in a process's batch in evaluation; when not given, one and a half times --batch_size",
               metavar="IMAGES", ranges=ABOVE_0, **FREE),
        Option("dist_eval", bool, True, "share the test images out among the processes", **FREE),
        Option("resume", str, None, "checkpoint to continue from, or the directory of its run", metavar="PATH", **FREE),
        Option("auto_resume", bool, True, "continue the run that --output_dir holds", **NEUTRAL),
        Option("overwrite", bool, False, "replace the run, or with --eval the report, that --output_dir holds",
               needs=(OUTPUT,), **NEUTRAL),
        Option("save_ckpt", bool, True, "write checkpoints", needs=(TRAINING, OUTPUT), **NEUTRAL),
        Option("save_ckpt_freq", int, 1, "epochs from one checkpoint to the next", metavar="EPOCHS", ranges=FROM_1,
               needs=(TRAINING, OUTPUT, CHECKPOINTS), **NEUTRAL),
        Option("save_ckpt_steps", int, None, "checkpoints within an epoch too, every so many steps", metavar="STEPS",
               ranges=ABOVE_0, needs=(TRAINING, OUTPUT, CHECKPOINTS), **NEUTRAL),
        Option("save_ckpt_num", int, 3, "checkpoints to keep, of those after an epoch and likewise of those within one",
               ranges=FROM_1, needs=(TRAINING, OUTPUT, CHECKPOINTS), **NEUTRAL),
        Option("start_epoch", int, 0, "first epoch, counted from 0; a checkpoint sets its own", ranges=FROM_0,
               needs=(TRAINING,), **FREE),
        Option("enable_wandb", bool, False, "log to Weights & Biases", **NEUTRAL),
        Option("project", str, "weight-selection", "project of Weights & Biases", needs=(WANDB,), **NEUTRAL),
        Option("wandb_ckpt", bool, False, "upload the last checkpoint to Weights & Biases",
               needs=(OUTPUT, CHECKPOINTS, WANDB), **NEUTRAL),
    ),
    "processes": (
        # The number of processes decides in which order floats are added up.
        Option("world_size", int, None, "number of processes expected; the launcher sets it", **FREE),
        Option("local_rank", int, None, "set by torch.distributed.launch", aliases=("--local-rank",), **NEUTRAL),
        Option("dist_on_itp", bool, False, "processes were started by Open MPI's mpirun", **FREE),
        Option("dist_url", str, "env://", "where the processes meet", **NEUTRAL),
        Option("timeout", float, 1800, "longest wait for a process or loader worker", metavar="SECONDS",
               ranges=ABOVE_0 + FOUR_MONTHS, **NEUTRAL),
    ),
}
# fmt: on

# The options of a checkpoint that say what its model is, and what it was trained on.
RECORDED_MODEL = ("model", "model_kwargs", "input_size", "imagenet_default_mean_and_std")
RECORDED = (*RECORDED_MODEL, "linear_probe", "crop_pct", "data_set", "data_path", "eval_data_path")

OPTIONS = {option.name: option for rows in TABLE.values() for option in rows}
MAY_CHANGE_ON_RESUME = frozenset(name for name, option in OPTIONS.items() if option.may_change_on_resume)
CANNOT_CHANGE_RESULT = frozenset(name for name, option in OPTIONS.items() if option.cannot_change_result)


def get_args_parser() -> Parser:
    """The parser of main.py's command line; its errors are InputErrors."""
    parser = Parser("main.py", "Train or evaluate a model from random or selected weights.")
    for title, rows in TABLE.items():
        group = parser if title is None else parser.add_argument_group(title)
        for option in rows:
            form = {"type": option.type, "nargs": option.nargs, "metavar": option.metavar}
            form |= one_of(option.choices) if option.choices else {}
            if option.type is bool:
                form |= {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
            if option.type is dict:
                form = {"action": Kwargs, "nargs": "*", "metavar": "K=V"}
            flags = (f"--{option.name}", *option.aliases)
            group.add_argument(*flags, default=copy.copy(option.default), help=option.help, **form)
    for name, why in NOT_TAKEN.items():
        parser.add_argument(f"--{name}", nargs="*", action=_Refuse, const=why, help=argparse.SUPPRESS)
    return parser


# Options of the release that main.py does not have.
NOT_TAKEN = {
    "resplit": "training images are not split for augmentation here, and no experiment of the paper does it",
    "model_prefix": "keys of a file are matched without one; the prefixes of DDP and torch.compile are removed",
}


class _Refuse(argparse.Action):
    def __init__(self, **form):
        super().__init__(**form | {"default": argparse.SUPPRESS})

    def __call__(self, parser, namespace, values, option_string=None):
        raise InputError(f"{' '.join([option_string, *values])}: {self.const}; leave it out")


def read_config(path: str) -> list[str]:
    """The options in a recipe as words of main.py's command line; InputError as in ``read_recipe``."""
    recipe = read_recipe(path, "--config", _print_if_first, OPTIONS.keys() - {"config"})
    return [word for key, words in recipe.items() for word in (f"--{key}", *words)]


def _print_if_first(line, file=None):
    if find_launch(os.environ).rank == 0:
        print(line, file=file or sys.stderr)


def default_options() -> Options:
    """The options of a command line that gives none."""
    return Options(**{name: copy.copy(option.default) for name, option in OPTIONS.items()})


def parse_args(argv: list[str] | None = None, recorded: dict | None = None) -> Options:
    """Options from the command line, then from ``--config``, then the defaults: the first that gives one decides.

    The options are checked against each other.

    Args:
        recorded: options that replace defaults, but nothing that command line or ``--config`` give.

    Raises:
        InputError: see ``check_options``; or a word is no option.
    """
    parser = get_args_parser()
    given = _parse_given(parser, argv)
    configured = {}
    if "config" in given:
        words = read_config(given["config"])
        try:
            configured = _parse_given(parser, words)
        except InputError as error:
            raise InputError(f"--config {given['config']}: {error}") from error
    options = default_options().replace(**_fitting(recorded or {}, configured | given) | configured | given)
    check_options(options, set(given))
    return options


def _fitting(recorded, given):
    """The recorded options, without the recorded paths if another data set or another path is given."""
    same = given.get("data_set", recorded.get("data_set")) == recorded.get("data_set") and "data_path" not in given
    return {name: value for name, value in recorded.items() if same or name not in ("data_path", "eval_data_path")}


def parse_args_with(found: list, argv: list[str] | None = None) -> Options:
    """As ``parse_args``, with options that checkpoints record. It prints which options it takes from them.

    Args:
        found: [({option: value}, path of the checkpoint that records them)].

    Raises:
        InputError: as ``parse_args``; or in an evaluation, another model is given than the checkpoint's.
    """
    args = parse_args(argv, {name: value for recorded, _ in found for name, value in recorded.items()})
    for recorded, origin in found:
        given = {name: value for name, value in args.plain().items() if name in recorded and value != recorded[name]}
        if args.eval:
            for name in [name for name in ("model", "model_kwargs") if name in given]:
                words = _in_words(name, recorded[name])
                raise InputError(f"{_in_words(name, given[name])}: {origin} is of {words}; leave --{name} out")
        elif "model" in given:  # the weights may still fit; nothing else that their checkpoint says is about this model
            return parse_args_with([other for other in found if other[0] is not recorded], argv)
        taken = {
            name: value for name, value in recorded.items() if name not in given and value != OPTIONS[name].default
        }
        words = [_in_words(name, value) for name, value in taken.items()]
        _print_if_first(f"{origin} says: {' '.join(words)}", sys.stdout)
        for name, value in given.items():
            if not name.endswith("path"):
                words = _in_words(name, recorded[name])
                _print_if_first(f"{_in_words(name, value)}: {origin} was trained with {words}", sys.stdout)
    return args


def _in_words(name, value):
    """An option as the words of a command line."""
    if isinstance(value, dict):
        value = " ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"--{name} {str(value).lower() if isinstance(value, bool) else value}"


def _parse_given(parser, argv):
    """{name: value} of the options that are among the words; no word gives an option the value None."""
    values = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(OPTIONS)))
    return {name: value for name, value in vars(values).items() if value is not None}


def check_options(args: Options, given: set) -> None:
    """Refuse options that are out of range, contradict each other, or would have no effect.

    An option without effect is refused only if it is ``given`` on the command line with another value than its default.
    A recipe may set options that the command line makes useless.

    Raises:
        InputError: names an option, its value and what to do instead.
    """
    for name, option in OPTIONS.items():
        value = getattr(args, name)
        if value == "" and option.metavar in NAMED:
            raise InputError(f"--{name}: is empty; give {NAMED[option.metavar]}, or leave the option out")
        for allowed in option.ranges:
            if value is not None and not allowed.holds(value):
                raise InputError(f"{_in_words(name, value)}: give {allowed.words}")
        if option.type is dict:
            check_kwargs(value, f"--{name}", {key: f"{setter} sets it" for key, setter in option.set_by.items()})
    check_together(args)
    for name, option in OPTIONS.items():
        for need in option.needs:
            value = getattr(args, name)
            used = value != option.default and (name in given or need.always)
            if used and not need.met(args):
                why = need.otherwise.format(**vars(args))
                raise InputError(f"--{name} {value}: has no effect with {why}; leave it out")


def check_together(args: Options) -> None:
    """Refuse options that contradict each other, or that lack another one."""
    if args.warmup_steps < 0 and (args.warmup_epochs or 0) > args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs}: longer than --epochs {args.epochs}; lower it")
    if args.start_epoch >= args.epochs:
        raise InputError(f"--start_epoch {args.start_epoch}: must be less than --epochs {args.epochs}")
    if args.min_lr > args.lr:
        raise InputError(f"--min_lr {args.min_lr}: above --lr {args.lr}, where the cosine begins; lower it")
    if args.cutmix_minmax is not None:
        low, high = (int(args.input_size * share) for share in args.cutmix_minmax)
        if low == high:  # timm draws a whole number of pixels from low to high - 1
            words = _in_words("cutmix_minmax", args.cutmix_minmax)
            raise InputError(f"{words}: not a pixel apart at --input_size {args.input_size}; set them further apart")
    weights = ["initialize", "finetune", *(["resume"] if args.eval else [])]
    weights = [name for name in weights if getattr(args, name)]
    if len(weights) > 1:
        raise InputError(f"{_in_words(weights[0], getattr(args, weights[0]))}: give it or --{weights[1]}, not both")
    if args.eval and not weights:
        raise InputError("--eval true: name the weights to evaluate with --resume, --initialize or --finetune")
    if args.distillation != "none" and args.teacher is None and args.teacher_path is None:
        raise InputError(f"--distillation {args.distillation}: name the model to learn from with --teacher")
    frozen = "features are frozen under --linear_probe true"
    if args.linear_probe and args.drop_path > 0:
        raise InputError(f"--drop_path {args.drop_path}: {frozen}; set it to 0")
    if args.linear_probe and args.distillation != "none":
        raise InputError(f"--distillation {args.distillation}: {frozen}; leave it out")
    if args.overwrite and args.resume and not args.eval:
        raise InputError(f"--overwrite true: would delete what --resume {args.resume} continues; leave one out")
    if args.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("--enable_wandb true: the package is not installed; run: python -m pip install wandb")


def check_weights(args: Options) -> None:
    """Refuse, with an InputError, files that are not there, and names that cannot be used.

    These are the names of models, and of directories that a run would make.
    """
    check_name(args.model, "--model", TIMM)
    if args.teacher:
        check_name(args.teacher, "--teacher", TIMM)
    wanted = {"initialize": "what weight_selection.py wrote", "resume": "a checkpoint, or the --output_dir of a run"}
    for name, what in wanted.items():
        path = getattr(args, name)
        if path and not Path(path).exists():
            raise InputError(f"--{name} {path}: no such file or directory; name {what}")
    for name in ("finetune", "teacher_path"):
        if getattr(args, name):
            files_of(getattr(args, name), f"--{name}")
    for name in ("output_dir", "log_dir"):
        if getattr(args, name):
            check_no_file(getattr(args, name), f"--{name}")


def complete_warmup(args: Options) -> Options:
    """Options with a number of warm-up epochs. Default: a sixth of all, at most 50, as in Table 13 (50 of 300)."""
    return args if args.warmup_epochs is not None else args.replace(warmup_epochs=min(50, args.epochs // 6))


def share_batch(args: Options, world_size: int) -> Options:
    """Options in which micro-batch, accumulation and ``--total_batch_size`` agree for a number of processes.

    If the total is given, it decides the other two: the micro-batch is the largest one up to ``--batch_size`` that
    divides a process's share of the total. If not, the other two decide the total.

    Raises:
        InputError: the total cannot be shared out, or mixup gets an odd micro-batch.
    """
    total, batch_size, update_freq = args.total_batch_size, args.batch_size, args.update_freq
    if total is not None:
        share, rest = divmod(total, world_size)
        if rest or share < 1:
            raise InputError(f"--total_batch_size {total}: not a multiple of {world_size} processes")
        sizes = [n for n in range(1, min(share, batch_size) + 1) if share % n == 0 and not (mixes(args) and n % 2)]
        if not sizes:
            raise InputError(
                f"--total_batch_size {total}: mixup needs an even number of images in each of "
                f"{world_size} processes; change it, or --batch_size {batch_size}, or set --mixup 0 --cutmix 0"
            )
        batch_size, update_freq = sizes[-1], share // sizes[-1]
    elif mixes(args) and batch_size % 2:
        raise InputError(f"--batch_size {batch_size}: mixup mixes pairs; give an even number, or --mixup 0 --cutmix 0")
    total = batch_size * update_freq * world_size
    return args.replace(batch_size=batch_size, update_freq=update_freq, total_batch_size=total)
