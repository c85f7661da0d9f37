"""The options of main.py: what they are, what they may be, and which contradict each other."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from datasets import DATA_SETS
from distributed.launch import find_launch
from models import SCHEMES
from weight_selection.arguments import Kwargs, Parser, boolean, check_kwargs
from weight_selection.errors import InputError
from weight_selection.files import check_file
from weight_selection.sources.recipe import read_recipe


def get_args_parser() -> Parser:
    parser = Parser("main.py", "Train or evaluate a model from random or selected weights.")
    add = parser.add_argument
    add("--config", metavar="FILE", help="recipe: YAML file of options, or FILE:SECTION; those on the command line win")
    add(
        "--batch_size",
        type=int,
        default=64,
        help="images in a process's micro-batch (with --total_batch_size: at most)",
    )
    add("--update_freq", type=int, default=1, help="micro-batches per step: gradient accumulation")
    add(
        "--total_batch_size",
        type=int,
        help="images per step over all processes; sets accumulation (and micro-batch: mixup pairs within it)",
    )
    add("--epochs", type=int, default=300)

    group = parser.add_argument_group("model").add_argument
    group("--model", default="vit_tiny", metavar="NAME", help="a model of the paper, or any timm name")
    group("--model_kwargs", nargs="*", default={}, action=Kwargs, metavar="K=V", help="such as embed_dim=96")
    group("--drop_path", type=float, default=0.0, metavar="RATE", help="stochastic depth")
    group("--input_size", type=int, default=224, help="side of the input in pixels")
    group("--layer_scale_init_value", type=float, default=1e-6, help="LayerScale of ConvNeXt at random init")
    group("--head_init_scale", type=float, default=1.0, help="factor on the classifier's first weights")
    group("--init", choices=SCHEMES, default="timm", help="random initialisation")
    group("--initialize", metavar="PATH", help="weight_selection.py's file, or the directory it is in")
    group("--finetune", metavar="FILE", help="weights of a trained model of this architecture")
    group("--model_key", default="model|module", help="keys of the weights in the --finetune file, in order, by |")
    group("--linear_probe", type=boolean, default=False, help="train only a new classifier, on frozen features")
    group("--model_ema", type=boolean, default=False, help="keep an exponential moving average of the weights")
    group("--model_ema_decay", type=float, default=0.9999)
    group("--model_ema_force_cpu", type=boolean, default=False, help="keep the average in CPU memory")
    group("--model_ema_eval", type=boolean, default=False, help="evaluate the average after every epoch too")

    group = parser.add_argument_group("distillation").add_argument
    group("--distillation", choices=("none", "logit", "feature"), default="none", help="what to match of a teacher's")
    group("--distillation_alpha", type=float, default=1.0, metavar="A", help="weight of the distillation loss")
    group("--teacher", metavar="NAME", help="a model of the paper, or any timm name")
    group("--teacher_path", metavar="FILE", help="its weights from disk, not from the hub")
    group("--teacher_kwargs", nargs="*", default={}, action=Kwargs, metavar="K=V", help="such as embed_dim=384")

    group = parser.add_argument_group("optimisation").add_argument
    group("--opt", default="adamw", help="any optimiser of timm")
    group("--opt_eps", type=float, default=1e-8)
    group("--opt_betas", type=float, nargs="+", help="the optimiser's own when not given")
    group("--momentum", type=float, default=0.9, help="for optimisers that have one")
    group("--clip_grad", type=float, metavar="NORM", help="largest gradient norm; no clipping when not given")
    group("--weight_decay", type=float, default=0.05)
    group("--weight_decay_end", type=float, help="of a cosine schedule; constant when not given")
    group("--lr", type=float, default=4e-3, help="peak learning rate, used as it is for any batch size")
    group("--layer_decay", type=float, default=1.0, help="factor on the learning rate per layer below the top")
    group("--min_lr", type=float, default=1e-6, help="learning rate the cosine ends at")
    group("--warmup_epochs", type=int, default=50)
    group("--warmup_steps", type=int, default=-1, help="warm-up in steps instead, when not negative")

    group = parser.add_argument_group("augmentation").add_argument
    group("--color_jitter", type=float, default=0.4, help="used with --aa none")
    group("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's auto-augment policy, or none")
    group("--smoothing", type=float, default=0.1, help="label smoothing")
    group("--train_interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic")
    group("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    group("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    group("--crop_pct", type=float, help="centre crop in evaluation (default: 224/256 below 384 pixels)")
    group("--reprob", type=float, default=0.25, help="random erasing: probability")
    group("--remode", choices=("const", "rand", "pixel"), default="pixel", help="random erasing: fill")
    group("--recount", type=int, default=1, help="random erasing: rectangles")
    group("--mixup", type=float, default=0.8, metavar="ALPHA")
    group("--cutmix", type=float, default=1.0, metavar="ALPHA")
    group("--cutmix_minmax", type=float, nargs=2, help="bounds of the cut, instead of --cutmix")
    group("--mixup_prob", type=float, default=1.0, help="of mixup or cutmix")
    group("--mixup_switch_prob", type=float, default=0.5, help="of cutmix when both are on")
    group("--mixup_mode", choices=("batch", "pair", "elem"), default="batch")

    group = parser.add_argument_group("data").add_argument
    group("--data_set", choices=list(DATA_SETS), default="IMNET")
    group("--data_path", metavar="DIR")
    group("--eval_data_path", metavar="DIR", help="class folders to test on; --data_path then holds those to train on")
    group("--nb_classes", type=int, help="checked against the data set, which knows it")
    group("--imagenet_default_mean_and_std", type=boolean, default=True, help="false: 0.5 and 0.5")
    group("--num_workers", type=int, help="loader processes (default: 10, or this process's share of the cores)")
    group("--augment_device", type=boolean, default=False, help="augment on the device that trains, not in workers")
    group("--cache_images", type=boolean, default=False, help="decode all images at the start and keep them in memory")
    group("--pin_mem", type=boolean, default=True)
    group("--skip_bad_images", type=int, default=0, metavar="N", help="replace up to N damaged training images")

    group = parser.add_argument_group("run").add_argument
    group("--output_dir", metavar="DIR", help="checkpoints, log.txt and results.json; nothing is written without it")
    group("--log_dir", metavar="DIR", help="TensorBoard")
    group("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    group("--seed", type=int, default=0)
    group("--deterministic", type=boolean, default=False, help="only algorithms that give the same bits each time")
    group("--compile", type=boolean, default=False, help="torch.compile; goes on without, and says so, where it fails")
    group("--channels_last", type=boolean, default=False, help="memory layout that convolutions on GPUs like")
    group("--use_amp", type=boolean, default=False, help="mixed precision")
    group("--amp_dtype", choices=("float16", "bfloat16"), help="default: float16 on cuda, bfloat16 on cpu")
    group("--eval", type=boolean, default=False, help="only evaluate --resume, --initialize or --finetune")
    group("--disable_eval", type=boolean, default=False, help="evaluate after the last epoch only")
    group("--eval_interval", type=int, default=1, metavar="EPOCHS", help="epochs from one evaluation to the next")
    group("--eval_batch_size", type=int, metavar="IMAGES", help="(default: one and a half times --batch_size)")
    group("--dist_eval", type=boolean, default=True, help="share the test images out among the processes")
    group("--resume", metavar="FILE", help="checkpoint to continue from")
    group("--auto_resume", type=boolean, default=True, help="continue the run that --output_dir holds")
    group("--overwrite", type=boolean, default=False, help="delete the run that --output_dir holds, and start anew")
    group("--save_ckpt", type=boolean, default=True)
    group("--save_ckpt_freq", type=int, default=1, metavar="EPOCHS")
    group("--save_ckpt_steps", type=int, metavar="STEPS", help="checkpoints within an epoch too, every so many steps")
    group("--save_ckpt_num", type=int, default=3, help="numbered checkpoints to keep, of each kind")
    group("--start_epoch", type=int, default=0, help="first epoch, counted from 0; a checkpoint sets its own")
    group("--enable_wandb", type=boolean, default=False, help="log to Weights & Biases")
    group("--project", default="weight-selection", help="its project")
    group("--wandb_ckpt", type=boolean, default=False, help="upload the last checkpoint to it")

    group = parser.add_argument_group("processes").add_argument
    group("--world_size", type=int, help="number of processes expected; the launcher sets it")
    group("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    group("--dist_on_itp", type=boolean, default=False, help="started by Open MPI's mpirun")
    group("--dist_url", default="env://", help="where the processes meet")
    group("--timeout", type=float, default=1800, metavar="SECONDS", help="longest wait for a process or loader worker")
    return parser


def read_config(path: str, parser: Parser, option: str = "--config") -> list[str]:
    """A recipe's options as words of main.py's command line.

    Raises:
        InputError: as ``read_recipe``, or the recipe has a key that is no option.
    """
    known = {action.dest for action in parser._actions} - {"help", "config"}
    words = []
    for key, value in read_recipe(path, option, _print_by_first_process).items():
        if key not in known:
            raise InputError(f"{option} {path}: {key} is not an option of main.py")
        words += [f"--{key}", *value]
    return words


def _print_by_first_process(line: str) -> None:
    if find_launch(os.environ).rank == 0:
        print(line, file=sys.stderr)


def parse_args(argv=None):
    """Options from the command line over those of ``--config`` over the defaults, checked against each other."""
    parser = get_args_parser()
    unset = object()
    given = argparse.Namespace(**{action.dest: unset for action in parser._actions if action.dest != "help"})
    given = {key: value for key, value in vars(parser.parse_args(argv, given)).items() if value is not unset}
    args = parser.parse_args(read_config(given["config"], parser) if "config" in given else [])
    for key, value in given.items():
        setattr(args, key, value)
    check_options(args, set(given))
    return args


def mixes(args) -> bool:
    """Whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_options(args, given: set) -> None:
    """Refuse options that contradict each other, are out of range, or would have no effect.

    Args:
        args: all options.
        given: names of those on the command line; only these can be without effect by mistake.
    """
    for name in (
        "batch_size",
        "update_freq",
        "epochs",
        "input_size",
        "save_ckpt_freq",
        "save_ckpt_num",
        "eval_interval",
    ):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: give a number from 1 up")
    for name in (
        "seed",
        "warmup_epochs",
        "start_epoch",
        "lr",
        "min_lr",
        "weight_decay",
        "mixup",
        "cutmix",
        "distillation_alpha",
        "skip_bad_images",
    ):
        if not getattr(args, name) >= 0:
            raise InputError(f"--{name} {getattr(args, name)}: give a number from 0 up")
    for name in ("drop_path", "smoothing", "hflip", "reprob", "mixup_prob", "mixup_switch_prob", "model_ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"--{name} {getattr(args, name)}: give a number from 0 to 1")
    for name in ("clip_grad", "crop_pct", "save_ckpt_steps", "eval_batch_size", "timeout"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)}: give a number above 0, or leave it out")
    if args.timeout > 1e7:
        raise InputError(f"--timeout {args.timeout}: give a number up to 1e7, which is four months")
    if args.crop_pct is not None and args.crop_pct > 1:
        raise InputError(f"--crop_pct {args.crop_pct}: give a number above 0 and up to 1")
    if args.num_workers is not None and args.num_workers < 0:
        raise InputError(f"--num_workers {args.num_workers}: give a number from 0 up")
    setters = {"num_classes": "--data_set", "drop_path_rate": "--drop_path", "img_size": "--input_size"}
    check_kwargs(args.model_kwargs, "--model_kwargs", {key: f"{option} sets it" for key, option in setters.items()})
    setters = {"num_classes": "--data_set", "img_size": "--input_size"}
    check_kwargs(args.teacher_kwargs, "--teacher_kwargs", {key: f"{option} sets it" for key, option in setters.items()})
    if not 0 < args.layer_decay <= 1:
        raise InputError(f"--layer_decay {args.layer_decay}: give a number above 0 and up to 1")
    if args.warmup_steps < 0 and args.warmup_epochs > args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs}: longer than --epochs {args.epochs}; lower it")
    if args.start_epoch >= args.epochs:
        raise InputError(f"--start_epoch {args.start_epoch}: must be less than --epochs {args.epochs}")
    if args.initialize and args.finetune:
        raise InputError(f"--initialize {args.initialize}: give it or --finetune, not both")
    if args.eval and not (args.resume or args.initialize or args.finetune):
        raise InputError("--eval true: name the weights to evaluate with --resume, --initialize or --finetune")
    if args.distillation != "none" and args.teacher is None:
        raise InputError(f"--distillation {args.distillation}: name the model to learn from with --teacher")
    if args.linear_probe and args.drop_path > 0:
        raise InputError(f"--drop_path {args.drop_path}: features are frozen under --linear_probe true; set it to 0")
    if args.linear_probe and args.distillation != "none":
        raise InputError(
            f"--distillation {args.distillation}: features are frozen under --linear_probe true; leave it out"
        )
    if args.overwrite and args.resume:
        raise InputError(f"--overwrite true: would delete what --resume {args.resume} continues; leave one out")
    if DATA_SETS[args.data_set].layout is None and args.data_path is not None:
        raise InputError(f"--data_path {args.data_path}: has no effect with --data_set {args.data_set}; leave it out")
    if args.eval_data_path is not None and not DATA_SETS[args.data_set].folders:
        raise InputError(f"--eval_data_path {args.eval_data_path}: has no effect with --data_set {args.data_set}")

    if args.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("--enable_wandb true: the package is not installed; run: python -m pip install wandb")

    without_effect = (
        (not args.model_ema, "--model_ema false", ("model_ema_decay", "model_ema_force_cpu", "model_ema_eval")),
        (not args.use_amp, "--use_amp false", ("amp_dtype",)),
        (args.eval, "--eval true", ("compile",)),
        (args.weight_decay == 0, "--weight_decay 0", ("weight_decay_end",)),
        (not mixes(args), "--mixup 0 --cutmix 0", ("mixup_prob", "mixup_switch_prob", "mixup_mode")),
        (args.cutmix_minmax is not None, "--cutmix_minmax", ("cutmix",)),
        (args.aa != "none", f"--aa {args.aa}", ("color_jitter",)),
        (args.reprob == 0, "--reprob 0", ("remode", "recount")),
        (not args.finetune, "no --finetune", ("model_key",)),
        (bool(args.finetune or args.resume) and not args.eval, "--finetune or --resume", ("init",)),
        (
            args.distillation == "none",
            "--distillation none",
            ("distillation_alpha", "teacher", "teacher_path", "teacher_kwargs"),
        ),
        (args.linear_probe, "--linear_probe true", ("head_init_scale", "layer_decay")),
        (args.total_batch_size is not None, "--total_batch_size, which sets it", ("update_freq",)),
        (args.warmup_steps >= 0, "--warmup_steps", ("warmup_epochs",)),
        (args.disable_eval, "--disable_eval true", ("eval_interval",)),
        (
            args.output_dir is None,
            "no --output_dir",
            ("overwrite", "save_ckpt", "save_ckpt_freq", "save_ckpt_steps", "save_ckpt_num", "wandb_ckpt"),
        ),
        (
            not args.save_ckpt,
            "--save_ckpt false",
            ("save_ckpt_freq", "save_ckpt_steps", "save_ckpt_num", "wandb_ckpt"),
        ),
        (not args.enable_wandb, "--enable_wandb false", ("project", "wandb_ckpt")),
    )
    for condition, why, names in without_effect:
        for name in names:
            if condition and name in given:
                raise InputError(f"--{name} {getattr(args, name)}: has no effect with {why}; leave it out")


def check_weights(args) -> None:
    """Refuse files of first weights and of a teacher's that are not there."""
    if args.initialize and not Path(args.initialize).exists():
        raise InputError(f"--initialize {args.initialize}: no such file or directory")
    for name in ("finetune", "teacher_path"):
        if getattr(args, name):
            check_file(getattr(args, name), f"--{name}")


def share_batch(args, world_size: int) -> None:
    """Work out micro-batch and accumulation from ``--total_batch_size``, or the total from them.

    Raises:
        InputError: the total cannot be shared out, or mixup gets an odd micro-batch.
    """
    if args.total_batch_size is not None:
        share, rest = divmod(args.total_batch_size, world_size)
        if rest or share < 1:
            raise InputError(f"--total_batch_size {args.total_batch_size}: not a multiple of {world_size} processes")
        sizes = [n for n in range(1, min(share, args.batch_size) + 1) if share % n == 0 and not (mixes(args) and n % 2)]
        if not sizes:
            raise InputError(
                f"--total_batch_size {args.total_batch_size}: mixup needs an even number of images in each of "
                f"{world_size} processes; change it, or --batch_size {args.batch_size}, or set --mixup 0 --cutmix 0"
            )
        args.batch_size, args.update_freq = sizes[-1], share // sizes[-1]
    elif mixes(args) and args.batch_size % 2:
        raise InputError(
            f"--batch_size {args.batch_size}: mixup mixes pairs; give an even number, or --mixup 0 --cutmix 0"
        )
    args.total_batch_size = args.batch_size * args.update_freq * world_size
