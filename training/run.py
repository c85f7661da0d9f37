"""One run: from complete options to a trained or evaluated model and its results, in one of the processes."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timm.utils import distribute_bn

from distributed.process_group import main_only
from distributed.program import Launch, RunError, Stopped
from distributed.stop_coordinator import StopCoordinator
from engine import EpochMetrics, TrainState, evaluate, train_one_epoch
from input_pipeline.cache import check_memory
from input_pipeline.loader import BadImages, DeviceLoader
from models.distillation import build_teacher
from training import checkpoint, output_dir
from training.example_images import example_images
from training.first_classifier import fit_first_classifier
from training.metric_log import MetricLog, check_wandb
from training.options import Options
from training.progress import RunProgress
from training.setup import RunData, build_model, build_train_state, open_data, warm_up
from training.trained_model import check_classes, describe_model
from utils import describe, duration, print_main, versions
from weight_selection.cost import parameter_count
from weight_selection.errors import InputError
from weight_selection.files import begin_sha256, check_writable, without_empty_directories, write_json
from weight_selection.sources.directories import files_of
from weight_selection.sources.initial_weights import read_provenance


def run(options: Options, launch: Launch, device: torch.device, default_warmup: bool) -> None:
    """Train or evaluate as the options say.

    Args:
        options: complete ones, which stay as they are; see ``complete_options``.
        default_warmup: nobody gave the number of warm-up epochs, so the run prints it.

    Raises:
        InputError: an option does not fit the machine, the data or the other options.
        RunError: the run started well and cannot go on.
        Stopped: a signal asked the run to stop.
    """
    new_directories = without_empty_directories(options.output_dir, options.log_dir)
    with StopCoordinator(options.timeout) as stop_coordinator, new_directories:
        data = open_data(options)
        if options.log_dir and not options.eval:
            check_writable(options.log_dir, "--log_dir")
        if options.enable_wandb and not options.eval:
            main_only(check_wandb)
        model = build_model(options, data.classes)
        distills = options.distillation != "none" and not options.eval
        teacher = build_teacher(options, data.classes) if distills else None
        if options.cache_images:
            data_sets = [data_set for data_set in (data.train_set, data.test_set) if data_set is not None]
            check_memory(data_sets, device if options.augment_device else None, stop_coordinator)
        # Nothing has been written up to here: options that are refused leave no run behind.
        with output_dir.reserve(options) as found:
            state = build_train_state(
                options, model, teacher, device, launch, stop_coordinator, data.steps_per_epoch, data.classes
            )
            progress = RunProgress(epoch=options.start_epoch - 1, train_images=data.train_images)
            if found:
                progress = resume(options, state, found, data)
            report = open_report(options, data, state) if options.eval and options.output_dir else None
            if options.cache_images:
                data.keep_in_memory()
            test_loader = data.test_loader(options, state)
            if options.classifier_init == "ridge" and not found and not options.eval:
                progress.classifier_init = fit_first_classifier(options, state, data)
            stop_coordinator.defer_signals = True
            if options.eval:
                metrics = evaluate_with_ema(options, state, test_loader, report and report.note)
                print_main(f"{options.model}: {describe(metrics)}")
                if report:
                    report.write(metrics)
            else:
                if default_warmup:
                    counts = f"{options.warmup_epochs} of {options.epochs} epochs"
                    print_main(f"warm-up: {counts}; --warmup_epochs sets another number")
                train_and_report(options, state, data, test_loader, progress)


def open_report(options: Options, data: RunData, state: TrainState) -> "EvalReport":  # noqa: F821
    """The report of an evaluation; training does not wait for the import of what draws it."""
    from training.eval_report import EvalReport

    return EvalReport(options, data, state)


def resume(options: Options, state: TrainState, path: Path, data: RunData) -> RunProgress:
    """Restore a checkpoint, which must be of the same run unless ``--resume`` names it; returns its progress."""
    named = options.resume is not None and path == Path(options.resume)
    origin = f"{'--resume' if named else '--output_dir'} {path}"
    content = checkpoint.read(path, origin)
    if not named:
        output_dir.check_same_run(options, content["args"], path.name)
    progress = checkpoint.restore(options, state, content, origin, data.train_images)
    check_classes(content, options, data.class_names, origin)
    partial = progress.partial
    written = f"step {partial.step} of epoch {progress.epoch + 1}" if partial else f"epoch {progress.epoch}"
    print_main(f"resumed {path}, written after {written}")
    return progress


def train_and_report(
    options: Options, state: TrainState, data: RunData, test_loader: DeviceLoader, progress: RunProgress
) -> None:
    """Train to the last epoch; print what the run is and how it ended, and write ``results.json``."""
    results = {
        "train_images": data.train_images,
        "test_images": len(data.test_set),
        "n_parameters": parameter_count(state.model),
        "total_batch_size": options.total_batch_size,
        "processes": state.world_size,
    }
    print_main(f"{options.model}: " + describe(results))
    results["class_names"] = data.class_names
    for option, path in (("initialize", options.initialize), ("teacher", options.teacher_path)):
        results[f"{option}_sha256"] = path and begin_sha256(*files_of(path, f"--{option}")).result()
    if options.initialize and (provenance := read_provenance(options.initialize, "--initialize")):
        results["first_weights"] = {name: provenance[name] for name in ("teacher", "student", "options")}
    if progress.epoch == options.epochs - 1:
        print_main("all epochs are done; nothing left to train")
    if progress.classifier_init:
        results["classifier_init"] = progress.classifier_init
    bad_images = BadImages(options.skip_bad_images, state.stop_coordinator, progress.bad_images)
    loader = data.train_loader(options, state, bad_images)
    first_step = (progress.epoch + 1) * state.steps_per_epoch + (progress.partial.step if progress.partial else 0)
    with MetricLog(options, progress.epoch + 1, first_step) as log:
        if log.shows_images:
            log.add_images(example_images(options, state, loader))
        saver = Saver(options, state, progress, loader.bad_images, describe_model(options, data.class_names))
        train(options, state, loader, test_loader, progress, log, saver)
    if options.output_dir:
        main_only(write_results, options, progress, results)
    print_main("; ".join(f"{name} {describe(metrics)}" for name, metrics in progress.evaluations().items()))


def train(
    options: Options,
    state: TrainState,
    loader: DeviceLoader,
    test_loader: DeviceLoader,
    progress: RunProgress,
    log: MetricLog,
    saver: "Saver",
) -> None:
    """Train from the position of ``progress`` to the last epoch; keep log, checkpoints and ``progress`` up to date.

    Raises:
        Stopped: a signal asked the run to stop; its state is saved.
        RunError: see ``engine``.
    """
    first_epoch, start = progress.epoch + 1, time.monotonic()
    if first_epoch < options.epochs:
        warm_up(options, state, test_loader.batch_size)
    for epoch in range(first_epoch, options.epochs):
        metrics = EpochMetrics(state, epoch, loader.bad_images, progress.partial, log.add_step)
        is_last = epoch == options.epochs - 1
        with saver.saving_if_stopped(metrics):
            speed = train_rest_of_epoch(options, state, loader, metrics, saver)
            row, better = {f"train_{name}": value for name, value in metrics.means().items()}, []
            if is_last or (not options.disable_eval and (epoch + 1) % options.eval_interval == 0):
                try:
                    test_metrics = evaluate_with_ema(options, state, test_loader)
                except RunError:  # a test image cannot be read: without a checkpoint the epoch would be lost
                    saver.save_within_epoch(metrics)
                    raise
                row |= {f"test_{name}": value for name, value in test_metrics.items() if name != "images"}
                better = progress.note_evaluation(test_metrics, epoch)
        saver.end_epoch(epoch)
        row |= {"epoch": epoch, "n_parameters": parameter_count(state.model)}
        main_only(log.add, row, {"train_images_per_second": speed})
        for name in better:  # before the numbered one: a run that is killed in between repeats the epoch, and this
            saver.save(name)
        if is_last or (epoch + 1) % options.save_ckpt_freq == 0:
            log.checkpoint = saver.save()
        left = (time.monotonic() - start) / (epoch + 1 - first_epoch) * (options.epochs - 1 - epoch)
        print_main(f"epoch {epoch}: {describe(row)}, {speed:.0f} images/s, {duration(left)} left")


class Saver:
    """Keeps a run's progress up to date, and saves checkpoints unless the options say not to.

    All processes must call its methods after the same step.
    """

    def __init__(
        self, options: Options, state: TrainState, progress: RunProgress, bad_images: BadImages, description: dict
    ):
        self.options, self.state, self.progress, self.bad_images = options, state, progress, bad_images
        self.description = description
        self.start = time.monotonic() - progress.seconds
        self.saves = bool(options.output_dir and options.save_ckpt)
        if self.saves:
            self._prune()  # the run may have been killed before it did

    def end_epoch(self, epoch: int) -> None:
        """Note that an epoch is over."""
        self.progress.epoch, self.progress.partial = epoch, None
        self._count()

    def save(self, name: str | None = None) -> Path | None:
        """Write a checkpoint after an epoch, under a name such as best or else the epoch's number; returns its path."""
        if not self.saves:
            return None
        path = checkpoint.save(self.options, self.state, self.progress, self.description, name)
        if name is None:
            self._prune()
        return path

    def save_within_epoch(self, metrics: EpochMetrics) -> Path | None:
        """Write a checkpoint after a step; ``metrics`` must be synchronized. Returns its path."""
        self.progress.partial = metrics.sums
        self._count()
        return self.save()

    @contextlib.contextmanager
    def saving_if_stopped(self, metrics: EpochMetrics) -> Iterator[None]:
        """Save when a signal stops the block, if all processes stop at this step."""
        try:
            yield
        except Stopped as stopped:
            if self.saves and stopped.agreed:
                if metrics.pending:
                    metrics.synchronize()
                path = self.save_within_epoch(metrics)
                unless = "" if self.options.auto_resume else " without --auto_resume false"
                unless = " without --overwrite" if self.options.overwrite else unless
                stopped.advice = f"the same command{unless} goes on from {path}"
            raise

    def _count(self):
        self.progress.seconds = time.monotonic() - self.start
        self.progress.bad_images = sorted(self.bad_images.known)

    def _prune(self):
        main_only(output_dir.prune, Path(self.options.output_dir), self.options.save_ckpt_num)


def train_rest_of_epoch(
    options: Options, state: TrainState, loader: DeviceLoader, metrics: EpochMetrics, saver: Saver
) -> float:
    """Take the steps of an epoch that are not yet done; returns images per second."""
    done, start = metrics.step, time.monotonic()
    if done < state.steps_per_epoch:
        loader.sampler.set_position(metrics.epoch, done)
        for _ in train_one_epoch(state, loader, metrics):
            if metrics.step < state.steps_per_epoch:  # after the last step, the evaluation comes before a checkpoint
                state.stop_coordinator.poll()
                if saver.saves and options.save_ckpt_steps and metrics.step % options.save_ckpt_steps == 0:
                    metrics.synchronize()
                    saver.save_within_epoch(metrics)
        average_batch_statistics(state)
    return (state.steps_per_epoch - done) * options.total_batch_size / (time.monotonic() - start)


def average_batch_statistics(state: TrainState) -> None:
    """Give all processes the mean of their running statistics.

    Before each step, DDP gives all processes those of the first, so the model's differ by the last step's images.
    """
    if state.world_size > 1:
        distribute_bn(state.model, state.world_size, reduce=True)
        if state.ema is not None:
            distribute_bn(state.ema.module, state.world_size, reduce=True)


def evaluate_with_ema(options: Options, state: TrainState, loader: DeviceLoader, note: Callable | None = None) -> dict:
    """Evaluate the model and, with ``--model_ema_eval``, its moving average, whose metrics end in ``_ema``.

    ``note``, as of ``evaluate``, gets the model's own outputs.
    """
    metrics = evaluate(state.model, loader, state, options.dist_eval, note)
    if options.model_ema_eval and state.ema is not None:
        average = evaluate(state.ema.module, loader, state, options.dist_eval)
        metrics |= {f"{name}_ema": value for name, value in average.items() if name != "images"}
    return metrics


def write_results(options: Options, progress: RunProgress, results: dict) -> None:
    """Write ``results.json`` (accuracies in percent, what was run on what, which versions), or raise a RunError."""
    content = {
        **progress.evaluations(),
        **({"bad_images": progress.bad_images} if progress.bad_images else {}),
        "epochs": options.epochs,
        "seed": options.seed,
        "model": options.model,
        "initialize": options.initialize,
        "data_set": options.data_set,
        **results,
        "wall_time": progress.seconds,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "versions": versions(),
        "args": options.plain(),
    }
    try:
        write_json(Path(options.output_dir) / "results.json", content)
    except InputError as error:
        raise RunError(f"{error}; all epochs are done and saved: run it again for the results") from error
