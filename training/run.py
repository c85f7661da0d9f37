"""One run: from checked options to a trained or evaluated model and its results, in one of the processes."""

import contextlib
import os
import time
from pathlib import Path

import torch
import torch.nn as nn
from timm.data import Mixup
from timm.layers import set_fused_attn
from timm.utils import ModelEmaV3, distribute_bn
from torch.nn.parallel import DistributedDataParallel

import utils
from datasets import build_dataset
from distributed.launch import Launch
from distributed.process_group import init_distributed, main_only
from distributed.program import RunError, Stopped
from distributed.stop_coordinator import StopCoordinator
from engine import EpochMetrics, TrainState, evaluate, train_one_epoch
from input_pipeline.bad_images import BadImages, BadTestImages
from input_pipeline.cache import CachedDataset, check_memory
from input_pipeline.loader import eval_loader, train_loader
from input_pipeline.placement import build_pipeline
from input_pipeline.samplers import EvalSampler, TrainBatchSampler
from models.distillation import Loss, WithProjector, build_teacher
from models.initialization import initialize
from models.linear_probe import make_linear_probe
from optim_factory import cosine_schedule, create_optimizer
from training import checkpoint
from training.metric_log import MetricLog
from training.options import get_args_parser, mixes
from utils import print_main
from weight_selection.errors import InputError
from weight_selection.files import check_writable, sha256, write_json
from weight_selection.sources.families import CONVNEXT
from weight_selection.sources.membership import family_by_class
from weight_selection.sources.timm_models import check_input_size, create_model
from weight_selection.sources.weight_files import find_weights, load_finetune, load_initial


def check_hardware(args, local_rank: int) -> tuple:
    """Options complete for this machine, the device and the dtype of mixed precision (None without).

    Raises:
        InputError: there is no such device, or it has no such arithmetic.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first call
    torch.use_deterministic_algorithms(args.deterministic)
    args = args.replace(device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.num_workers is None:
        workers = max(1, min(10, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        args = args.replace(num_workers=workers)
    local_processes = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if args.device == "cuda" and local_processes > torch.cuda.device_count():
        raise InputError(
            f"--device cuda: {local_processes} processes on a machine with {torch.cuda.device_count()} GPUs; "
            "start fewer processes or use --device cpu"
        )
    device = torch.device("cuda", local_rank) if args.device == "cuda" else torch.device("cpu")
    if not args.use_amp:
        return args, device, None
    args = args.replace(amp_dtype=args.amp_dtype or ("float16" if args.device == "cuda" else "bfloat16"))
    if args.device == "cpu" and args.amp_dtype == "float16":
        raise InputError("--amp_dtype float16: needs a GPU; use bfloat16 on a CPU")
    if args.device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise InputError("--use_amp true: this CPU has no bfloat16 arithmetic; leave it out")
    if args.device == "cuda" and args.amp_dtype == "bfloat16" and not torch.cuda.is_bf16_supported(False):
        raise InputError("--amp_dtype bfloat16: this GPU has none; use float16")
    return args, device, getattr(torch, args.amp_dtype)


def build_model(args, classes: int) -> nn.Module:
    """The model with the weights that training starts from."""
    utils.seed_everything(args.seed)
    kwargs = {"num_classes": classes, "drop_path_rate": args.drop_path, **args.model_kwargs}
    model = create_model(args.model, input_size=args.input_size, device="meta", **kwargs)
    if family_by_class(model) is CONVNEXT:
        kwargs.setdefault("ls_init_value", args.layer_scale_init_value)
    elif args.layer_scale_init_value != get_args_parser().get_default("layer_scale_init_value"):
        raise InputError(
            f"--layer_scale_init_value: is ConvNeXt's; for {args.model} use --model_kwargs init_values=VALUE"
        )
    model = create_model(args.model, input_size=args.input_size, **kwargs)
    check_input_size(model, args.input_size, args.model)
    initialize(model, args.init)
    if args.head_init_scale != 1:
        with torch.no_grad():
            for parameter in model.get_classifier().parameters():
                parameter.mul_(args.head_init_scale)
    if args.initialize:
        path = find_weights(args.initialize, model, "--initialize")
        kept = load_initial(model, path, "--initialize")
        print_main(f"initialised from {path}; random: {', '.join(kept) or 'nothing'}")
    elif args.finetune:
        kept = load_finetune(model, args.finetune, "--finetune", args.model_key.split("|"))
        print_main(f"fine-tuning {args.finetune}; random: {', '.join(kept) or 'nothing'}")
    if args.linear_probe:
        make_linear_probe(model, args.model)
    return model


def build_trainer(args, model, device, dtype, launch, consensus, steps_per_epoch, classes, teacher=None) -> TrainState:
    """Optimiser, schedules, loss and everything else a step needs, around a model and a teacher to distill, or None."""
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    forward, projector = model, None
    if teacher is not None:
        teacher.to(device)
        if teacher.features:
            forward = WithProjector(model, teacher.model.head_hidden_size).to(device)
            projector = forward.projector
    if launch.world_size > 1:
        forward = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None)
    mixup = None
    if mixes(args):
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=classes,
        )
    steps = args.epochs * steps_per_epoch
    warmup = args.warmup_steps if args.warmup_steps >= 0 else args.warmup_epochs * steps_per_epoch
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    labels = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing)  # mixup smooths its own
    return TrainState(
        model=model,
        projector=projector,
        forward=forward,
        optimizer=create_optimizer(model, args, projector),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        ema=ema,
        lr=cosine_schedule(args.lr, args.min_lr, steps, warmup),
        weight_decay=cosine_schedule(args.weight_decay, end, steps),
        steps=steps_per_epoch,
        update_freq=args.update_freq,
        mixup=mixup,
        criterion=Loss(labels, teacher, args.distillation_alpha),
        autocast=dtype,
        clip_grad=args.clip_grad,
        device=device,
        seed=args.seed,
        rank=launch.rank,
        world_size=launch.world_size,
        consensus=consensus,
    )


def count_parameters(model: nn.Module) -> int:
    """Number of values in a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def test(args, trainer: TrainState, loader) -> dict:
    """Evaluate the model, and its moving average when asked for, whose figures end in ``_ema``."""
    stats = evaluate(trainer.model, loader, trainer, args.dist_eval)
    if args.model_ema_eval and trainer.ema is not None:
        average = evaluate(trainer.ema.module, loader, trainer, args.dist_eval)
        stats.update({f"{key}_ema": value for key, value in average.items() if key != "images"})
    return stats


def train(args, trainer: TrainState, loaders: tuple, progress: dict, board: MetricLog) -> None:
    """Train from where ``progress`` stands to the last epoch; keep log and checkpoints, and ``progress`` up to date.

    Raises:
        Stopped: by a signal; the state is saved.
        RunError: see ``engine``.
    """
    training, testing = loaders
    first, before, start = progress["epoch"] + 1, progress["seconds"], time.monotonic()
    bad = training.bad_images
    keeps = args.output_dir and args.save_ckpt
    unless = "--overwrite" if args.overwrite else "" if args.auto_resume else "--auto_resume false"

    def save(name=None):
        progress["seconds"] = before + time.monotonic() - start
        path = checkpoint.save(args, trainer, progress, name)
        if name is None:
            prune()
        return path

    def prune():
        main_only(lambda: checkpoint.prune(args.output_dir, args.save_ckpt_num))

    def save_within(figures):
        progress["partial"], progress["bad_images"] = figures.sums, sorted(bad.known)
        return save()

    def after_step():
        number = trainer.consensus.poll()
        due = args.save_ckpt_steps and figures.step % args.save_ckpt_steps == 0
        if figures.step < trainer.steps:  # after its last step, an epoch is evaluated first
            saved = None
            if keeps and (number or due):
                figures.read()
                saved = save_within(figures)
            if number:
                raise Stopped(number, saved=saved, unless=unless)

    if keeps:
        prune()  # a killed run may not have
    if first < args.epochs:
        prepare(args, trainer, testing.batch_size)
    for epoch in range(first, args.epochs):
        figures = EpochMetrics(trainer, epoch, bad, progress.get("partial"))
        done, begun = figures.step, time.monotonic()
        if done < trainer.steps:
            training.sampler.set_position(epoch, done)
            train_one_epoch(trainer, training, figures, after_step)
            average_batch_statistics(trainer)
        speed = (trainer.steps - done) * args.total_batch_size / (time.monotonic() - begun)
        row = {f"train_{key}": value for key, value in figures.means().items()}
        last = epoch == args.epochs - 1
        better = []
        if last or (not args.disable_eval and (epoch + 1) % args.eval_interval == 0):
            try:
                stats = test(args, trainer, testing)
            except (Stopped, RunError) as stop:
                agreed = not isinstance(stop, Stopped) or stop.agreed
                saved = save_within(figures) if keeps and agreed else None
                if isinstance(stop, Stopped):
                    stop.saved, stop.unless = saved, unless
                raise
            row |= {f"test_{key}": value for key, value in stats.items() if key != "images"}
            better = note_accuracy(progress, stats, epoch)
        progress |= {"epoch": epoch, "partial": None, "bad_images": sorted(bad.known)}
        row |= {"epoch": epoch, "n_parameters": count_parameters(trainer.model)}
        main_only(lambda row=row, speed=speed: board.add(row, {"train_images_per_second": speed}))
        if keeps:
            for name in better:  # before the numbered one: a run killed in between does this epoch again, this too
                save(name)
            if last or (epoch + 1) % args.save_ckpt_freq == 0:
                board.checkpoint = save()
        left = (time.monotonic() - start) / (epoch + 1 - first) * (args.epochs - 1 - epoch)
        print_main(f"epoch {epoch}: {utils.describe(row)}, {speed:.0f} images/s, {utils.duration(left)} left")


def prepare(args, trainer: TrainState, test_images: int) -> None:
    """What a run does before its first step, on images of zeros: compile, and arrange the exchange of gradients."""
    if not args.compile and trainer.world_size == 1:
        return
    shape = (3, args.input_size, args.input_size)
    images = torch.zeros(args.batch_size, *shape, device=trainer.device)
    targets = torch.zeros(args.batch_size, dtype=torch.long, device=trainer.device)
    if args.compile:
        trainer.compile(images, targets, torch.zeros(test_images, *shape, device=trainer.device))
    trainer.arrange(images, targets)


def average_batch_statistics(trainer: TrainState) -> None:
    """Give all processes the mean of their running statistics, which each has of its own images."""
    if trainer.world_size > 1:
        distribute_bn(trainer.model, trainer.world_size, reduce=True)
        if trainer.ema is not None:
            distribute_bn(trainer.ema.module, trainer.world_size, reduce=True)


def note_accuracy(progress: dict, stats: dict, epoch: int) -> list:
    """Note an evaluation in ``progress``; the names of the checkpoints (best, best-ema) that it is better than."""
    better = []
    for name, suffix in (("best", ""), ("best-ema", "_ema")):
        if f"acc1{suffix}" not in stats:
            continue
        figures = {"epoch": epoch} | {key: stats[key + suffix] for key in ("acc1", "acc5", "loss")}
        progress[name.replace("best", "last")] = figures
        if progress.get(name) is None or figures["acc1"] > progress[name]["acc1"]:
            progress[name] = figures
            better.append(name)
    return better


def results(args, progress: dict, facts: dict) -> dict:
    """What ``results.json`` holds: accuracies (percent), what was run on what, and with which versions."""
    figures = {key.replace("-", "_"): progress[key] for key in progress if key.startswith(("best", "last"))}
    return {
        **figures,
        **({"bad_images": progress["bad_images"]} if progress.get("bad_images") else {}),
        "epochs": args.epochs,
        "seed": args.seed,
        "model": args.model,
        "initialize": args.initialize,
        "data_set": args.data_set,
        **facts,
        "wall_time": progress["seconds"],
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": utils.versions(),
        "args": checkpoint.plain(args),
    }


def write_results(path: Path, record: dict) -> None:
    """Write ``results.json``; RunError if there is no space."""
    try:
        write_json(path, record)
    except InputError as error:
        raise RunError(f"{error}; all epochs are done and saved: run it again for the results") from error


def run(args, launch: Launch) -> None:
    """Train or evaluate as checked options say, in the process that ``launch`` tells apart."""
    args, device, dtype = check_hardware(args, launch.local_rank)
    set_fused_attn(device.type == "cuda")  # on a CPU the fused kernel is no faster, and slower in bfloat16
    init_distributed(launch, device, args.dist_url, args.timeout)
    with StopCoordinator(args.timeout) as consensus:
        train_or_evaluate(args, launch, device, dtype, consensus)


def agree(consensus: StopCoordinator, check) -> None:
    """Call ``check()`` in all processes; an InputError of any is raised in all."""
    refusal = None
    try:
        check()
    except InputError as error:
        refusal = str(error)
    refusals = [one for one in consensus.gather_objects(refusal) if one is not None]
    if refusals:
        raise InputError(refusals[0])


def train_or_evaluate(args, launch: Launch, device, dtype, consensus: StopCoordinator) -> None:
    """As ``run``, once all processes have met."""
    train_set = None if args.eval else build_dataset(args, train=True)[0]
    test_set, classes = build_dataset(args, train=False)
    if args.nb_classes not in (None, classes):
        raise InputError(f"--nb_classes {args.nb_classes}: {args.data_set} has {classes} classes; leave it out")
    steps = 1 if args.eval else len(train_set) // args.total_batch_size
    if steps < 1:
        raise InputError(
            f"--batch_size {args.batch_size}: the {len(train_set)} training images are fewer than one batch of "
            f"{args.total_batch_size}; lower it, --update_freq or --total_batch_size"
        )
    if not args.eval and args.skip_bad_images >= len(train_set):
        raise InputError(f"--skip_bad_images {args.skip_bad_images}: there are only {len(train_set)} training images")
    if args.log_dir:
        check_writable(args.log_dir, "--log_dir")
    model = build_model(args, classes)
    if args.initialize:  # the file, where a directory was named
        args = args.replace(initialize=str(find_weights(args.initialize, model, "--initialize")))
    teacher = None if args.eval or args.distillation == "none" else build_teacher(args, classes)
    images_of = {"test": test_set} if args.eval else {"train": train_set, "test": test_set}
    pipelines = {part: build_pipeline(args, part == "train") for part in images_of}
    if args.cache_images:
        agree(consensus, lambda: check_memory(images_of.values(), device if args.augment_device else None))
    # Until here nothing has been written: what is refused leaves no run behind.
    with contextlib.nullcontext() if args.eval else checkpoint.open_output(args) as found:
        trainer = build_trainer(args, model, device, dtype, launch, consensus, steps, classes, teacher)
        images = None if args.eval else len(train_set)
        progress = {"epoch": args.start_epoch - 1, "seconds": 0.0, "train_images": images}
        if found or args.resume:
            progress = checkpoint.resume(args, trainer, found or Path(args.resume), images)
        if args.cache_images:
            for part in pipelines:
                images_of[part] = CachedDataset(images_of[part], f"{part} images")
        place = (launch.rank, launch.world_size) if args.dist_eval else (0, 1)
        shard = EvalSampler(len(test_set), *place)
        testing = eval_loader(images_of["test"], pipelines["test"], shard, args, device, BadTestImages(consensus))
        consensus.patient = True
        if args.eval:
            print_main(f"{args.model}: {utils.describe(test(args, trainer, testing))}")
            return
        facts = {
            "train_images": images,
            "test_images": len(test_set),
            "n_parameters": count_parameters(model),
            "total_batch_size": args.total_batch_size,
            "processes": launch.world_size,
        }
        print_main(f"{args.model}: " + utils.describe(facts))
        for option, path in (("initialize", args.initialize), ("teacher", args.teacher_path)):
            facts[f"{option}_sha256"] = path and sha256(path)
        if progress["epoch"] == args.epochs - 1:
            print_main("all epochs are done; nothing left to train")
        batches = TrainBatchSampler(
            images, args.batch_size, steps, args.update_freq, launch.rank, launch.world_size, args.seed
        )
        with MetricLog(args, progress["epoch"] + 1, checkpoint.plain(args)) as board:
            bad = BadImages(args.skip_bad_images, consensus, progress.get("bad_images", ()))
            training = train_loader(images_of["train"], pipelines["train"], batches, args, device, bad)
            train(args, trainer, (training, testing), progress, board)
        if args.output_dir:
            record = results(args, progress, facts)
            main_only(lambda: write_results(Path(args.output_dir) / "results.json", record))
    print_main(
        "; ".join(f"{key} {utils.describe(progress[key])}" for key in progress if key.startswith(("best", "last")))
    )
