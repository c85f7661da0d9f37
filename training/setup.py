"""What a run needs before it trains: complete options, the device, the images, the model and the state of training."""

import copy
import inspect
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from timm.data import Mixup
from timm.layers import set_fused_attn
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from datasets import build_dataset, class_names
from distributed.program import Launch
from distributed.stop_coordinator import StopCoordinator
from engine import TrainState, autocast
from input_pipeline import loader
from input_pipeline.cache import CachedDataset
from input_pipeline.loader import BadImages, DeviceLoader
from input_pipeline.placement import Pipeline, build_pipeline
from models.distillation import Loss, Teacher, WithProjector
from models.initialization import initialize, make_linear_probe
from optim_factory import cosine_schedule, create_optimizer
from training import checkpoint
from training.options import OPTIONS, Options, complete_warmup, default_options, mixes
from utils import print_main, seed_everything
from weight_selection.commands import student_words
from weight_selection.errors import InputError, first_line, printable
from weight_selection.image_files import IMAGE_SUFFIXES
from weight_selection.sources.architectures import CONVNEXT, declared_architecture
from weight_selection.sources.directories import files_of
from weight_selection.sources.initial_weights import find_weights, load_finetune, load_initial, read_provenance
from weight_selection.sources.teachers import normalization, normalization_option, normalization_words
from weight_selection.sources.timm_models import check_input_size, create_model
from weight_selection.sources.weight_files import NESTED


def complete_options(options: Options, local_rank: int) -> Options:
    """Fill in the warm-up, what depends on the machine (device, loader workers, dtype), and the files that paths mean.

    Raises:
        InputError: the machine has no such device or arithmetic, or a directory has no weights that fit.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
    gpus, needed = torch.cuda.device_count(), max(local_rank + 1, processes)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and needed > gpus:
        raise InputError(
            f"--device cuda: {needed} processes on a machine with {gpus} GPUs; "
            "start fewer processes or use --device cpu"
        )
    workers, amp_dtype, initial_weights = options.num_workers, options.amp_dtype, options.initialize
    named = {name: only_file(getattr(options, name), f"--{name}") for name in ("finetune", "teacher_path")}
    named["resume"] = options.resume and str(checkpoint.find(options.resume, "--resume", not options.eval))
    if workers is None:
        workers = max(1, min(10, (os.cpu_count() or 1) // processes))
    if options.use_amp:
        amp_dtype = amp_dtype or ("float16" if device == "cuda" else "bfloat16")
        _check_arithmetic(device, amp_dtype)
    initial_weights = initial_weights and str(Path(initial_weights))
    if initial_weights and Path(initial_weights).is_dir():  # the model says which file in it is meant
        model = create_model(options.model, input_size=options.input_size, device="meta", **options.model_kwargs)
        initial_weights = str(find_weights(initial_weights, model, "--initialize", _as_student(options, model)))
    return complete_warmup(options).replace(
        device=device, num_workers=workers, amp_dtype=amp_dtype, initialize=initial_weights, **named
    )


def only_file(path: str | None, option: str) -> str | None:
    """The file of weights that a path means; the path itself if it is a file, or a directory of several shards."""
    files = files_of(path, option) if path else []
    return str(files[0]) if len(files) == 1 else path


def _check_arithmetic(device, amp_dtype):
    if device == "cpu" and amp_dtype == "float16":
        raise InputError("--amp_dtype float16: needs a GPU; use bfloat16 on a CPU")
    if device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise InputError("--use_amp true: this CPU has no bfloat16 arithmetic; set it to false")
    if device == "cuda" and amp_dtype == "bfloat16" and not torch.cuda.is_bf16_supported(False):
        raise InputError("--amp_dtype bfloat16: this GPU has none; use float16")


def set_up_device(options: Options, local_rank: int) -> torch.device:
    """Choose this process's device, and how PyTorch computes on it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first call
    torch.use_deterministic_algorithms(options.deterministic)
    set_fused_attn(options.device == "cuda")  # on a CPU the fused kernel is no faster, and slower in bfloat16
    return torch.device("cuda", local_rank) if options.device == "cuda" else torch.device("cpu")


@dataclass
class RunData:
    """The data sets of a run, and the pipelines that bring their images to the model."""

    train_set: Dataset | None  # None in an evaluation, like its pipeline
    test_set: Dataset
    train_pipeline: Pipeline | None
    test_pipeline: Pipeline
    class_names: list[str]  # in the order of their labels
    steps_per_epoch: int  # optimiser steps in an epoch; 1 in an evaluation

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def train_images(self) -> int | None:
        """Number of training images; None in an evaluation."""
        return None if self.train_set is None else len(self.train_set)

    def keep_in_memory(self) -> None:
        """Decode all images now."""
        if self.train_set is not None:
            self.train_set = CachedDataset(self.train_set, "train images")
        self.test_set = CachedDataset(self.test_set, "test images")

    def train_loader(self, options: Options, state: TrainState, bad_images: BadImages) -> DeviceLoader:
        """The loader of this process's micro-batches."""
        place = (state.rank, state.world_size)
        sampler = loader.TrainBatchSampler(
            self.train_images, options.batch_size, state.steps_per_epoch, state.update_freq, *place, state.seed
        )
        return loader.train_loader(self.train_set, self.train_pipeline, sampler, options, state.device, bad_images)

    def test_loader(self, options: Options, state: TrainState) -> DeviceLoader:
        """The loader of this process's share of the test images, or of all of them with ``--dist_eval false``."""
        place = (state.rank, state.world_size) if options.dist_eval else (0, 1)
        sampler = loader.EvalSampler(range(len(self.test_set)), *place)
        bad_images = loader.BadTestImages(state.stop_coordinator)
        return loader.eval_loader(self.test_set, self.test_pipeline, sampler, options, state.device, bad_images)


def open_data(options: Options) -> RunData:
    """Open the data sets and build their pipelines.

    Raises:
        InputError: a data set cannot be opened or does not fit the options.
    """
    train_set = None if options.eval else build_dataset(options, train=True)[0]
    test_set, classes = build_dataset(options, train=False)
    if left_out := [path for images in (train_set, test_set) for path in getattr(images, "left_out", ())]:
        named = f"{len(left_out):,} files are left out, such as {left_out[0]}"
        print_main(f"--data_path {options.data_path}: {named}; images end with {' '.join(IMAGE_SUFFIXES)}")
    if options.nb_classes not in (None, classes):
        raise InputError(f"--nb_classes {options.nb_classes}: {options.data_set} has {classes} classes; leave it out")
    steps = 1 if options.eval else len(train_set) // options.total_batch_size
    if steps < 1:
        raise InputError(
            f"--batch_size {options.batch_size}: the {len(train_set)} training images are fewer than one batch of "
            f"{options.total_batch_size}; lower it, --update_freq or --total_batch_size"
        )
    skip = options.skip_bad_images
    if not options.eval and skip >= len(train_set):
        raise InputError(f"--skip_bad_images {skip}: there are only {len(train_set)} training images")
    train_pipeline = None if options.eval else build_pipeline(options, train=True)
    names, test_pipeline = class_names(test_set, classes), build_pipeline(options, train=False)
    return RunData(train_set, test_set, train_pipeline, test_pipeline, names, steps)


def build_model(options: Options, classes: int) -> nn.Module:
    """The model with the weights from which training starts.

    Raises:
        InputError: the model cannot be built, or the weights do not fit it.
    """
    seed_everything(options.seed)
    kwargs = {"num_classes": classes, **options.model_kwargs}
    model = create_model(options.model, input_size=options.input_size, device="meta", **kwargs)
    if options.drop_path > 0 or _takes(model, "drop_path_rate"):
        kwargs["drop_path_rate"] = options.drop_path
    if declared_architecture(model) is CONVNEXT:
        kwargs.setdefault("ls_init_value", options.layer_scale_init_value)
    elif options.layer_scale_init_value != default_options().layer_scale_init_value:
        raise InputError(
            f"--layer_scale_init_value: is ConvNeXt's; for {options.model} use --model_kwargs init_values=VALUE"
        )
    model = create_model(options.model, input_size=options.input_size, **kwargs)
    check_input_size(model, options.input_size, f"--model {options.model}")
    initialize(model, options.init)
    if options.head_init_scale != 1:
        classifier = model.get_classifier()  # a distilled DeiT has two
        with torch.no_grad():
            for parameter in nn.ModuleList(classifier if isinstance(classifier, tuple) else [classifier]).parameters():
                parameter.mul_(options.head_init_scale)
    if options.initialize:
        keys = NESTED if options.model_key == OPTIONS["model_key"].default else options.model_key.split("|")
        kept = load_initial(model, options.initialize, "--initialize", keys, _as_student(options, model))
        print_main(f"initialised from {options.initialize}; random: {', '.join(kept) or 'nothing'}")
        _compare_normalization(options)
    elif options.finetune:
        kept = load_finetune(model, options.finetune, "--finetune", options.model_key.split("|"))
        print_main(f"fine-tuning {options.finetune}; random: {', '.join(kept) or 'nothing'}")
    weights = options.initialize or options.finetune
    if weights and not kept and options.head_init_scale != 1 and not options.eval:
        raise InputError(f"--head_init_scale {options.head_init_scale}: {weights} has the classifier too; leave it out")
    if options.linear_probe:
        make_linear_probe(model, options.model)
    if options.batch_size == 1 and not options.eval:
        _check_single_image(model, options)
    return model


def _check_single_image(model, options):
    """Refuse a micro-batch of one image, if a batch normalisation cannot train on it."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).train()(torch.zeros(1, 3, options.input_size, options.input_size))
    except ValueError as error:
        raise InputError(
            f"--batch_size 1: {options.model} has a batch normalisation, which cannot train on one image; "
            "give 2 or more, and a --total_batch_size that this divides"
        ) from error


def _takes(model, name):
    """Whether a model's class has an argument of that name, or takes any; DenseNets and VGGs have no drop path."""
    parameters = inspect.signature(type(model)).parameters.values()
    return any(parameter.name == name or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _compare_normalization(options):
    """Warn if the teacher of the first weights saw images of another normalisation than this run's."""
    provenance = read_provenance(options.initialize, "--initialize")
    taught = provenance and provenance.get("normalization")
    own = dict(zip(("mean", "std"), map(list, normalization(options.imagenet_default_mean_and_std)), strict=True))
    if not taught or taught == own:
        return
    value, option = normalization_option(**taught), "--imagenet_default_mean_and_std"
    print_main(
        f"warning: the teacher of {options.initialize} saw images normalised with {normalization_words(**taught)}, and "
        f"this run normalises by others; {option} " + (f"{value} gives these" if value else "cannot give these")
    )


def _as_student(options, model):
    """The model that the options name, as options of weight_selection.py."""
    size = {"img_size": options.input_size} if model.pretrained_cfg.get("fixed_input_size") else {}
    return student_words(options.model, options.model_kwargs | size)


def build_train_state(
    options: Options,
    model: nn.Module,
    teacher: Teacher | None,
    device: torch.device,
    launch: Launch,
    stop_coordinator: StopCoordinator,
    steps_per_epoch: int,
    classes: int,
) -> TrainState:
    """Put optimiser, schedules, loss and everything else that a step needs around a model, which moves to the device.

    A state that takes no step needs no ``stop_coordinator``.

    Raises:
        InputError: the optimiser or the warm-up does not fit.
    """
    model.to(device, memory_format=torch.channels_last if options.channels_last else torch.preserve_format)
    ema_device = "cpu" if options.model_ema_force_cpu else None
    ema = ModelEmaV3(model, decay=options.model_ema_decay, device=ema_device) if options.model_ema else None
    ddp_model, projector = model, None
    if teacher is not None:
        teacher.to(device)
        if teacher.features:
            ddp_model = WithProjector(model, teacher.model.head_hidden_size).to(device)
            projector = ddp_model.projector
    if launch.world_size > 1:
        ddp_model = DistributedDataParallel(ddp_model, device_ids=[device.index] if device.type == "cuda" else None)
    total_steps = options.epochs * steps_per_epoch
    warmup_steps = options.warmup_steps if options.warmup_steps >= 0 else options.warmup_epochs * steps_per_epoch
    weight_decay_end = options.weight_decay if options.weight_decay_end is None else options.weight_decay_end
    amp_dtype = getattr(torch, options.amp_dtype) if options.use_amp else None
    mixup = build_mixup(options, classes)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else options.smoothing)  # mixup smooths by itself
    return TrainState(
        model=model,
        projector=projector,
        ddp_model=ddp_model,
        optimizer=create_optimizer(model, options, projector),
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16),
        ema=ema,
        lr_schedule=cosine_schedule(options.lr, options.min_lr, total_steps, warmup_steps),
        weight_decay_schedule=cosine_schedule(options.weight_decay, weight_decay_end, total_steps),
        steps_per_epoch=steps_per_epoch,
        update_freq=options.update_freq,
        mixup=mixup,
        criterion=Loss(criterion, teacher, options.distillation_alpha),
        amp_dtype=amp_dtype,
        clip_grad=options.clip_grad,
        device=device,
        seed=options.seed,
        rank=launch.rank,
        world_size=launch.world_size,
        stop_coordinator=stop_coordinator,
    )


def build_mixup(options: Options, classes: int) -> Mixup | None:
    """timm's mixup and cutmix with label smoothing, or None without them."""
    if not mixes(options):
        return None
    alphas = {"mixup_alpha": options.mixup, "cutmix_alpha": options.cutmix, "cutmix_minmax": options.cutmix_minmax}
    draws = {"prob": options.mixup_prob, "switch_prob": options.mixup_switch_prob, "mode": options.mixup_mode}
    return Mixup(**alphas, **draws, label_smoothing=options.smoothing, num_classes=classes)


def warm_up(options: Options, state: TrainState, test_batch_size: int) -> None:
    """Compile with ``--compile``, and with several processes fix DDP's bucket order.

    DDP arranges its buckets by the order in which the gradients of its first step come. With more than two processes
    the arrangement decides in which order floats are added up. Now a resumed run adds them in the same order.
    """
    if not options.compile and state.world_size == 1:
        return
    shape = (3, options.input_size, options.input_size)  # of the images, which are zeros
    images = torch.zeros(options.batch_size, *shape, device=state.device)
    targets = torch.zeros(options.batch_size, dtype=torch.long, device=state.device)
    if options.compile:
        compile_model(state, images, targets, torch.zeros(test_batch_size, *shape, device=state.device))
    if state.world_size > 1:
        dry_step(state, images, targets, exchange=True)


def compile_model(state: TrainState, images: torch.Tensor, targets: torch.Tensor, test_images: torch.Tensor) -> None:
    """Compile the model for batches of these shapes. If that fails in a process, all go on without, and say so."""
    wrapped = isinstance(state.ddp_model, DistributedDataParallel)
    modules = {state.model, state.ddp_model.module if wrapped else state.ddp_model}
    for module in modules:
        module.compile()
    failure = None
    try:
        dry_step(state, images, targets, exchange=False)
        with torch.no_grad(), autocast(state.device, state.amp_dtype):
            state.model.eval()(test_images)
    except Exception as error:  # no compiler, no Triton, an operator without a kernel: each fails in its own way
        failure = f"{type(error).__name__}: {first_line(error)}"
    if failure := state.stop_coordinator.first_of_all(failure):
        print_main(f"warning: --compile true: goes on without, as it failed ({printable(failure)[:300]})")
        for module in modules:
            module._compiled_call_impl = None  # undoes Module.compile, for which PyTorch has no public way


def dry_step(state: TrainState, images: torch.Tensor, targets: torch.Tensor, exchange: bool) -> None:
    """Compute a gradient, with or without an exchange between processes, and leave the state as it was."""
    before = [buffer.clone() for buffer in state.ddp_model.buffers()]
    state.ddp_model.train()
    try:
        state.backward(images, targets, exchange)
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(state.ddp_model.buffers(), before, strict=True):
                buffer.copy_(value)
