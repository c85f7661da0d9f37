#!/usr/bin/env python3
"""Compare what this working tree computes with what another revision of it computes, bit for bit, on a CPU.

python scripts/compare_revisions.py HEAD~1                      # everything, in a few minutes
python scripts/compare_revisions.py 3bea770 selection training  # some parts

With 3bea770, where the work on version 0.2 began, `selection` and `training` must still agree. The other parts are for
nearer revisions, for they have changed on purpose: the values of `projection`, the commands in `options` (Tables 8 and
17 run more of them) and the programs in `help`.

Each comparison prints one line. The exit status is 1 if any differs, 2 if the programs could not be compared.
Both revisions run in processes of their own and through their command lines, so the names of modules do not matter.
"""

import argparse
import ast
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("then", "now")
ENVIRONMENT = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
NEW_OPTIONS = ["verbose", "classifier", "width", "depth", "format", "dtype", "fused_qkv", "classifier_init"]
NEW_OPTIONS += ["baseline", "libraries"]  # of plot_curves.py and coverage.py; all since 3bea770
NEW_KEYS = {  # since 3bea770
    "classifier_init",  # of args.json and of a checkpoint's args
    "first_weights",  # of results.json
    "class_names",
    "description",  # of a checkpoint
    "train_class_acc",  # of log.txt
    "train_min_lr",
    "class_acc",  # of the sums of an epoch in a checkpoint
    "agreement",  # of the .json beside projected weights
    "normalization",  # of the .json beside all first weights
}
IGNORED = {"seconds", "wall_time", "versions"}  # keys whose values depend on clocks and installed packages

# Runs the commands on stdin in one process, as if each started alone: importing torch takes longer than a command.
RUN_COMMANDS = """
import contextlib, io, json, runpy, sys
path, outcomes = list(sys.path), []
for script, *words in json.load(sys.stdin):
    sys.argv, sys.path[:] = [script, *words], [script.rpartition("/")[0], *path]
    error, status = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except Exception as crash:
            status = repr(crash)
    outcomes.append([status, error.getvalue()[-300:]])
print(json.dumps(outcomes))
"""

# Prints the parsed options of the commands on stdin, beside which stand the names of options that are left out.
PARSE_COMMANDS = """
import importlib, json, sys
def find(name, *modules):
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            pass
    sys.exit(f"none of {modules} has {name}")
parse_main = find("parse_args", "options", "training.options")
make_parser = find("get_args_parser", "weight_selection.cli", "weight_selection")
check_options = find("check_options", "weight_selection.cli", "weight_selection")
parsed = []
new_options, commands = json.load(sys.stdin)
for program, *words in commands:
    if program == "main.py":
        args = vars(parse_main(words)) | {"config": None, "batch_size": None}  # the recipes state micro-batches now
    else:
        args = make_parser().parse_args(words)
        absent = {"pretrained_path": args.pretrained_path}  # files that a dry run does not have
        if args.calibration:
            absent["calibration"], args.calibration = args.calibration, "noise"
        args.pretrained_path = None
        check_options(args)
        args = vars(args) | absent | {"student_config": None}
        for name in ("stem_width", "channels"):  # 3bea770 spelt out ResNet-18-D's own sizes for the teacher
            args["teacher_kwargs"].pop(name, None)
    parsed.append({name: value for name, value in args.items() if name not in new_options})
print(json.dumps(parsed, sort_keys=True))
"""

# name: (timm's model, arguments of teacher and student, of the teacher, of the student)
# fmt: off
MODELS = {
    "vit": ("vit_tiny_patch16_224", "img_size=32 patch_size=8 num_classes=7 init_values=0.1",
            "embed_dim=48 num_heads=4 depth=5", "embed_dim=24 num_heads=2 depth=3"),
    "convnext": ("convnext_tiny", "num_classes=7",
                 "depths=(2,1,3,1) dims=(16,24,32,48)", "depths=(1,1,2,1) dims=(8,12,16,24)"),
    "resnet": ("resnet18", "num_classes=7", "channels=(24,32,48,64)", "channels=(12,16,24,32) layers=(1,2,1,1)"),
    "swin": ("swin_tiny_patch4_window7_224", "img_size=32 window_size=4 num_classes=7",
             "embed_dim=32 depths=(2,4) num_heads=(2,4)", "embed_dim=16 depths=(2,2) num_heads=(1,2)"),
    "mixer": ("mixer_s32_224", "img_size=32 patch_size=8 num_classes=7",
              "embed_dim=32 num_blocks=4", "embed_dim=16 num_blocks=2"),
}
# fmt: on
DIGITS_TEACHER = "patch_size=4 embed_dim=64 depth=2 num_heads=4"
DIGITS_MODEL = "patch_size=4 embed_dim=32 depth=2 num_heads=2"
DIGITS_STUDENT = "patch_size=4 embed_dim=16 depth=1 num_heads=1"
CALIBRATIONS = {"noise": "noise --calibration_images 24", "images": "../images"}
MIXING = "--model_ema true --mixup 0.8 --cutmix 1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --drop_path 0.1"
TEACHER = f"--teacher vit_tiny --teacher_path ../digits.pth --teacher_kwargs {DIGITS_TEACHER}"


class Workplace:
    """Both trees; a directory for each to write in, under the same names; random teachers and images for both."""

    def __init__(self, directory: Path, revision: str):
        self.directory, self.different = directory, 0
        self.trees = {"then": directory / "tree", "now": ROOT}
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True)
        if archive.returncode:
            fail(archive.stderr.decode())
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(self.trees["then"])
        for name in (*SIDES, "images"):
            (directory / name).mkdir()
        for model, (name, shared, larger, _) in MODELS.items():
            save_random(name, f"{shared} {larger}", directory / f"{model}.pth")
        save_random(MODELS["vit"][0], f"img_size=16 num_classes=10 {DIGITS_TEACHER}", directory / "digits.pth")
        for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (24, 40, 48, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(directory / "images" / f"{number}.png")

    def program(self, side: str, name: str) -> str:
        """The path of a program, which may have moved from scripts/ to experiments/."""
        places = [self.trees[side] / folder / name for folder in (".", "scripts", "experiments")]
        return str(next((path for path in places if path.exists()), places[0]))

    def start(self, side: str, command: str, **options) -> subprocess.Popen:
        """Start one program of a side, in the directory of that side."""
        name, *words = shlex.split(command)
        words = [sys.executable, self.program(side, name), *words]
        return subprocess.Popen(
            words, cwd=self.directory / side, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True, **options
        )

    def finish(self, side: str, command: str) -> list:
        """Run one program of a side to its end; its exit status, the end of its errors, and what it printed."""
        process = self.start(side, command, stderr=subprocess.PIPE)
        printed, errors = process.communicate()
        return [process.returncode, errors[-300:], printed]

    def ask(self, side: str, code: str, commands: list, directory: Path) -> list:
        """What one of the programs above prints of these commands."""
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(self.trees[side])}
        words = [sys.executable, "-c", code]
        child = subprocess.run(
            words, input=json.dumps(commands), stdout=subprocess.PIPE, cwd=directory, env=environment, text=True
        )
        if child.returncode:
            fail(f"a child process of the revision {side} ended with status {child.returncode}")
        return json.loads(child.stdout)

    def compare_commands(self, commands: dict) -> None:
        """Run {output directory: command} on both sides; compare exit status, errors and everything that each wrote."""

        def run(side):
            words = [shlex.split(command) for command in commands.values()]
            words = [[self.program(side, name), *rest] for name, *rest in words]
            return self.ask(side, RUN_COMMANDS, words, self.directory / side)

        for output, then, now in zip(commands, *both(run), strict=True):
            self.report_outcome(output, then, now)

    def report_outcome(self, output: str, then: list, now: list) -> None:
        """Compare [exit status, errors] of both sides, and the files in their output directories."""
        files = []
        for side in SIDES:
            paths = sorted(path for path in (self.directory / side / output).glob("**/[!.]*") if path.is_file())
            files.append({path.name: read(path) for path in paths})
        refused = f"(both refuse: {now[1].strip()[-120:]})" if now[0] else ""
        if not now[0] and not files[1]:
            refused = "(nothing written)"
        self.report(output.removeprefix("out/"), find_difference(then[:2], now[:2]) or find_difference(*files), refused)

    def report(self, name: str, difference: str | None, note: str = "") -> None:
        """Print the line of a comparison."""
        self.different += difference is not None
        print(f"{'same' if difference is None else 'DIFFERENT'}  {name}  {difference or note}".rstrip(), flush=True)


def fail(message: str) -> NoReturn:
    """End the program: the revisions could not be compared."""
    print(f"compare_revisions.py: error: {message.strip()}", file=sys.stderr)
    sys.exit(2)


def save_random(name: str, kwargs: str, path: Path) -> None:
    """Write a model of timm with random values everywhere, also where an initialisation has zeros or ones."""
    kwargs = {key: ast.literal_eval(value) for key, value in (word.split("=") for word in kwargs.split())}
    create = timm.models.MlpMixer if name.startswith("mixer") else functools.partial(timm.create_model, name)
    weights, generator = create(**kwargs).state_dict(), torch.Generator().manual_seed(0)
    for key, value in weights.items():
        if value.is_floating_point():
            offset = 0.5 if "var" in key or value.ndim == 1 else -0.25
            value.copy_(0.5 * torch.rand(value.shape, generator=generator) + offset)
    torch.save(weights, path)


def both(function: Callable[[str], object]) -> list:
    """``function("then")`` and ``function("now")``, computed at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, SIDES))


def read(path: Path) -> object:
    """The content of a file that a program wrote."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    if path.name == "log.txt":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def find_difference(then: object, now: object, where: str = "") -> str | None:
    """The first difference between two structures, in keys, order of keys, types, values or any bit of a tensor."""
    if type(then) is not type(now):
        return f"{where}: {then!r:.200}, now {now!r:.300}"
    if isinstance(then, dict):
        now = {key: value for key, value in now.items() if key not in NEW_KEYS - then.keys()}
        its_own = re.fullmatch(r"/checkpoint-[^/]*", where)  # keys of a checkpoint itself stood in the order of events
        if set(then) != set(now) or (list(then) != list(now) and not its_own):
            gone, new = [str(key) for key in then if key not in now], [str(key) for key in now if key not in then]
            return f"{where}: keys: gone {gone}, new {new}" if gone or new else f"{where}: another order of keys"
        pairs = [(key, then[key], now[key]) for key in then if key not in IGNORED]
    elif isinstance(then, list | tuple):
        if len(then) != len(now):
            return f"{where}: {len(then)} items, now {len(now)}"
        pairs = [(number, then[number], now[number]) for number in range(len(then))]
    elif isinstance(then, torch.Tensor):
        if (then.dtype, then.shape) != (now.dtype, now.shape):
            return f"{where}: {then.dtype} {tuple(then.shape)}, now {now.dtype} {tuple(now.shape)}"
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (then, now)]
        return None if torch.equal(*bits) else f"{where}: other values"
    else:
        return None if repr(then) == repr(now) else f"{where}: {then!r}, now {now!r}"[:600]
    return next(filter(None, (find_difference(a, b, f"{where}/{key}") for key, a, b in pairs)), None)


def selecting(model: str, output: str, more: str) -> str:
    """The command that selects a small model from the random teacher of its architecture."""
    name, shared, larger, smaller = MODELS[model]
    teacher = f"--pretrained_model {name} --pretrained_path ../{model}.pth --teacher_kwargs {shared} {larger}"
    student = f"--student {name} --student_kwargs {shared} {smaller}"
    return f"weight_selection.py --output_dir {output}/init.pth {teacher} {student} {more}"


def compare_selection(work: Workplace) -> None:
    """Every rule and choice of layers in five architectures, and the options that decide which tensors are written."""
    rules = ("uniform", "consecutive", "random", "random_inconsistent", "l1", "magnitude")
    layers = ("first_n", "mid_n", "last_n", "uniform", "quadratic")
    variants = {f"rule_{rule}": f"--element_selection {rule}" for rule in rules}
    variants |= {f"layers_{choice}": f"--layer_selection {choice}" for choice in layers}
    variants |= {f"exclude_{part}": f"--exclude {part}" for part in ("patch_embed", "norm", "mlp")}
    variants |= {
        "seed": "--element_selection random --seed 3 --layer_selection last_n",
        "include_head": "--include_head",
        "include_head_norm": "--include_head_norm",
        "complete": "--complete --seed 5",
        "complete_magnitude": "--complete --include_head --element_selection magnitude",
    }
    outputs = {f"out/selection/{model}/{name}": (model, more) for model in MODELS for name, more in variants.items()}
    work.compare_commands({output: selecting(model, output, more) for output, (model, more) in outputs.items()})


def compare_projection(work: Workplace) -> None:
    """Both rules that fit layers to images, with noise and with images; and parts of them taken out."""
    commands = {}
    for model in ("vit", "swin", "convnext", "resnet"):
        size = "--calibration_size 32" if model in ("convnext", "resnet") else ""
        for rule in ("project", "greedy") if model == "vit" else ("greedy",):
            for name, images in CALIBRATIONS.items():
                for layers in ("first_n", "uniform"):
                    output = f"out/projection/{model}/{rule}_{name}_{layers}"
                    more = f"--element_selection {rule} --layer_selection {layers} --calibration {images} {size}"
                    commands[output] = selecting(model, output, more)
    output = "out/projection/vit/project_other_images"
    larger = "--element_selection project --calibration noise --calibration_images 8"
    commands[output] = re.sub("(--student_kwargs .*?)img_size=32", r"\1img_size=48", selecting("vit", output, larger))
    work.compare_commands(commands)
    for rule, part in (("project", "frame"), ("project", "heads"), ("greedy", "coordinates"), ("greedy", "weights")):
        output = f"out/projection/{rule}_without_{part}"
        command = selecting("vit", output, f"--element_selection {rule} --calibration ../images")
        command = command.replace("weight_selection.py", f"ablate_projection.py {part}")
        work.report_outcome(output, *both(functools.partial(work.finish, command=command)))


def training(output: str, more: str = "", model: str = DIGITS_MODEL) -> str:
    """The command that trains a very small ViT on scikit-learn's digits, 10 steps an epoch."""
    length = "--epochs 3 --warmup_epochs 1 --save_ckpt_steps 3"
    return f"main.py --config ../digits.yaml --model_kwargs {model} {length} --output_dir {output} {more}"


def interrupt(work: Workplace, side: str, output: str, command: str, number: int) -> None:
    """Start a run, and send it a signal once it has saved a checkpoint within an epoch."""
    process = work.start(side, command, stderr=subprocess.STDOUT)
    while process.poll() is None and not list((work.directory / side / output).glob("checkpoint-*-step-*.pth")):
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate()


def compare_training(work: Workplace) -> None:
    """Ways to train; runs that were stopped go on, also on files that the other revision wrote."""
    shutil.copy(work.trees["then"] / "recipes/digits.yaml", work.directory / "digits.yaml")
    ways = {
        "plain": "",
        "mixing": MIXING,
        "schedules": "--layer_decay 0.8 --weight_decay_end 0.1 --init mimetic --clip_grad 1 --batch_size 50",
        "on_device": "--augment_device true --cache_images true --aa original",
        "feature": f"--distillation feature {TEACHER}",
        "logit": f"--distillation logit {TEACHER}",
    }
    work.compare_commands({f"out/training/{way}": training(f"out/training/{way}", more) for way, more in ways.items()})

    output, other = "out/training/stopped", "out/training/handed_over"
    command = training(output, MIXING)
    both(lambda side: interrupt(work, side, output, command, signal.SIGTERM))
    work.report_outcome(output, *both(functools.partial(work.finish, command=command)))
    command = training(other, MIXING)
    interrupt(work, "then", other, command, signal.SIGKILL)
    shutil.copytree(work.directory / "then" / other, work.directory / "now" / other)
    work.report_outcome(other, *both(functools.partial(work.finish, command=command)))

    shutil.copy(work.directory / "then/out/training/plain/checkpoint-best.pth", work.directory / "trained.pth")
    output, digits = "out/training/selected", "img_size=16 num_classes=10"
    names = "--pretrained_model vit_tiny --student vit_tiny --pretrained_path ../trained.pth"
    sizes = f"--teacher_kwargs {digits} {DIGITS_MODEL} --student_kwargs {digits} {DIGITS_STUDENT}"
    work.compare_commands({output: f"weight_selection.py --output_dir {output} {names} {sizes}"})
    shutil.copy(work.directory / "then" / output / "vit.pth", work.directory / "init.pth")
    output, other = "out/training/initialized", "out/training/probe"
    commands = {output: training(output, "--initialize ../init.pth", DIGITS_STUDENT)}
    commands[other] = training(other, "--linear_probe true --finetune ../trained.pth")
    work.compare_commands(commands)


# Programs whose options are compared: how many words stand between the name and the options.
PROGRAMS = {"main.py": 0, "weight_selection.py": 0, "ablate_projection.py": 1}


def planned_commands(work: Workplace, side: str, scripts: list) -> dict:
    """{script: what it would run, a list of words for each command, of which options are parsed}."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": "python", "DRY_RUN": "1", "OUT": "/none", "DATA": "/none"}
    plans, to_parse = {}, []
    for script in scripts:
        name, *smoke = script.split()
        words = ["env", *smoke, "bash", work.program(side, name)]
        dry_run = subprocess.run(words, env=environment, cwd=work.trees[side], capture_output=True, text=True)
        plans[script] = [[dry_run.returncode, dry_run.stderr]]
        for line in dry_run.stdout.splitlines():
            words = [re.sub(r"^(scripts|experiments)/(?=.*\.(py|sh)$)", "", word) for word in shlex.split(line)]
            python = words[:1] == ["python"]
            start = next((n + PROGRAMS[word] for n, word in enumerate(words) if python and word in PROGRAMS), None)
            plans[script].append(words if start is None else words[: start + 1])
            if start is not None:
                to_parse.append((plans[script][-1], words[start:]))
    parsed = work.ask(side, PARSE_COMMANDS, [NEW_OPTIONS, [words for _, words in to_parse]], work.trees[side])
    for (command, _), options in zip(to_parse, parsed, strict=True):
        command.append(options)
    return plans


def compare_options(work: Workplace) -> None:
    """The parsed options of every command of the scripts of tables, figures and experiments, in order."""
    names = []
    for tree in work.trees.values():
        paths = [*tree.glob("scripts/*.sh"), *tree.glob("experiments/*.sh")]
        names.append(sorted(p.name for p in paths if re.search(r"^source .*experiment\.sh", p.read_text(), re.M)))
    work.report("options/scripts", find_difference(*names))
    scripts = [name + smoke for name in names[0] if name in names[1] for smoke in ("", " SMOKE=1")]
    then, now = both(functools.partial(planned_commands, work, scripts=scripts))
    for script in scripts:
        count = f"({len(then[script]) - 1} commands)"
        work.report(f"options/{script}", find_difference(then[script], now[script]), count)


def compare_help(work: Workplace) -> None:
    """The options that --help lists, for both programs and every script."""

    def options_of(side, name):
        status, errors, printed = work.finish(side, f"{name} --help")
        listed = set(re.findall(r"^ +(--?[a-z][\w-]*)", printed, re.M)) - {f"--{option}" for option in NEW_OPTIONS}
        return [status, errors, sorted(listed)]

    scripts = [path for path in work.trees["then"].glob("scripts/*.py") if "__main__" in path.read_text()]
    for name in ("main.py", "weight_selection.py", *sorted(path.name for path in scripts)):
        then, now = both(functools.partial(options_of, name=name))
        work.report(f"help/{name}", find_difference(then, now), f"({len(then[2])} options)")


PARTS = {
    "selection": compare_selection,
    "projection": compare_projection,
    "training": compare_training,
    "options": compare_options,
    "help": compare_help,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", nargs="?", default="3bea770", help="the revision to compare with")
    parser.add_argument("parts", metavar="PART", nargs="*", help=f"some of: {' '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"{part}: choose from {' '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the directory is removed
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="compare_revisions_") as directory:
        work = Workplace(Path(directory), args.revision)
        for part in args.parts or PARTS:
            PARTS[part](work)
    print(f"{work.different} comparisons differ" if work.different else "no difference")
    sys.exit(bool(work.different))


if __name__ == "__main__":
    main()
