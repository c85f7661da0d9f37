#!/usr/bin/env python3
"""Train a student from the first weights of every arm; each finished run is a line of results.jsonl.

python experiments/rivals/run.py --phase tune --data_path data/ --output_dir rivals/ --processes 2 -- --use_amp false
python experiments/rivals/run.py --phase test ...

``tune`` trains every arm on the training images of Flowers-102 and evaluates on its validation images. From a
classifier in closed form it tries at least four learning rates, and goes on beyond the best while that is the largest
or the smallest; then it tries the best one with a random classifier. An arm 10 points behind the best at the first two
learning rates stops there, unless it is one of FINAL or the best of the others. With --lr it tries only those.

``test`` trains arms at their best settings, with three seeds, and evaluates on the test images: those of --arms, or
else FINAL, the best of the others and the ceiling. ``ablate`` trains project and greedy without their parts, and from
other images, at the settings of the whole, and evaluates on the validation images. ``--student`` takes another student
than the ViT (schedule.py).

What follows -- goes to main.py. DATA holds flowers-102/ and, for --data cifar100 and ablations, cifar100_50/
(experiments/cifar100_folders.py). A run that stands in results.jsonl is skipped, so the queue goes on where it stopped;
first weights are kept in the output directory.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository's modules
sys.path.insert(0, str(Path(__file__).parents[1]))  # and the experiments'
from scipy.io import loadmat

from rivals.arms import ABLATIONS, ARMS, CEILING, WHOLE
from rivals.schedule import (
    EPOCHS,
    RESULTS,
    STUDENTS,
    ablated,
    ablating,
    key_of,
    of_student,
    read_results,
    testing,
    tuning,
)
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program
from weight_selection.files import new_directory

ROOT = Path(__file__).parents[2]
NORMALIZATION = ("--imagenet_default_mean_and_std", "false")  # mean and std 0.5, as the teacher's images had
MADE_ONCE = ("student", "data", "phase", "arm", "seed")  # these runs share their first weights
SPLITS = {  # of Flowers-102: to train on 1,020 or 2,040 images, and to evaluate on 1,020 or 6,149
    "tune": {"train": ["trnid"], "val": ["valid"]},
    "test": {"train": ["trnid", "valid"], "val": ["tstid"]},
}


def link_flowers(data: Path, out: Path, splits: dict) -> None:
    """Write splits of Flowers-102 as class folders of links: {part: keys of setid.mat} gives OUT/PART/CLASS/IMAGE."""
    labels, numbers = loadmat(data / "imagelabels.mat")["labels"][0], loadmat(data / "setid.mat")
    with new_directory(out, "--output_dir") as whole:
        for part, keys in splits.items():
            for number in (number for key in keys for number in numbers[key][0]):
                folder = whole / part / f"{labels[number - 1] - 1:03}"
                folder.mkdir(parents=True, exist_ok=True)
                image = data / "jpg" / f"image_{number:05}.jpg"
                (folder / image.name).symlink_to(image.resolve())


class Queue:
    """The runs that are left; several threads take them one by one."""

    def __init__(self, args):
        self.args, self.lock, self.taken, self.failed, self.processes = args, Lock(), set(), [], []
        self.making = defaultdict(Lock)  # of what is in a directory, which several runs need

    def wanted(self, rows: list[dict]) -> list[dict]:
        """The runs of the phase, of which some may be among the finished ones."""
        args = self.args
        if args.phase == "tune":
            return tuning(rows, args.arms, args.student, args.lr)
        if args.phase == "ablate":
            return ablating(rows, args.arms, args.student, args.seeds)
        return testing(rows, args.arms, args.student, args.data, args.epochs or EPOCHS[args.data], args.seeds)

    def finished(self) -> list[dict]:
        """The finished runs of the student."""
        return of_student(read_results(self.args.results), self.args.student)

    def take(self) -> dict | None:
        """The next run that is neither finished nor taken."""
        with self.lock:
            rows = self.finished()
            done = self.taken | {key_of(row) for row in rows}
            run = next((run for run in self.wanted(rows) if key_of(run) not in done), None)
            self.taken |= {key_of(run)} if run else set()
            return run

    def work(self) -> None:
        """Do runs, and write their lines, until none is left."""
        while run := self.take():
            name = " ".join(map(str, key_of(run)))
            print(name, flush=True)
            try:
                row = self.do(run)
            except subprocess.CalledProcessError as error:
                self.failed.append(f"{name}: {error.cmd[1]} failed")
                print(self.failed[-1], flush=True)
            else:
                with self.lock, self.args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")

    def do(self, run: dict) -> dict:
        """Make the first weights unless they are there, and train from them; returns the line of the results."""
        args, name, words = self.args, "_".join(map(str, key_of(run))), self.recipe(run)
        init = args.output_dir / "init" / "_".join(str(run[word]) for word in MADE_ONCE)
        log, training = args.output_dir / "logs" / f"{name}.log", args.output_dir / "runs" / name
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            teacher = ["--teacher", STUDENTS[run["student"]].teacher]
            teacher += ["--teacher_path", args.teacher_path] if args.teacher_path else []
            teacher += ["--others", args.data_path / "cifar100_50" / "train"]
            with self.making[init]:
                if not init.exists():
                    program = Path(__file__).with_name("first_weights.py")
                    self.call(file, program, run["arm"], init, *teacher, "--", *words)
            words += ["--initialize", init / "weights.pth", "--classifier_init", run["classifier"], "--lr", run["lr"]]
            words += ["--eval_interval", run["epochs"], "--cache_images", "true"]
            words += ["--save_ckpt", "false", "--output_dir", training, "--overwrite", "true"]
            if run["epochs"] != EPOCHS[run["data"]]:
                words += ["--epochs", run["epochs"], "--warmup_epochs", run["epochs"] // 10 + 1]
            self.call(file, ROOT / "main.py", *words)
        results, facts = (json.loads(path.read_text()) for path in (training / "results.json", init / "facts.json"))
        shutil.rmtree(training)
        before = facts["seconds"] + (facts["seconds_classifier"] if run["classifier"] == "ridge" else 0)
        figures = {"probe": facts["probe"], "accuracy": results["last"]["acc1"]}
        figures |= {"seconds_before": before, "seconds_training": results["wall_time"]}
        figures = {figure: round(value, 2) for figure, value in figures.items()}
        return run | figures | {"torch": results["versions"]["torch"]}

    def recipe(self, run: dict) -> list:
        """The options of main.py that the first weights depend on too."""
        student = STUDENTS[run["student"]]
        words = ["--config", f"{student.recipe}:{run['data']}", "--data_set", "image_folder", *NORMALIZATION]
        words += ["--data_path", self.folders(run["data"], run["phase"]), "--seed", run["seed"], "--num_workers", 0]
        words += [*student.changes, *self.args.main_args]
        return [*words, *(["--model_kwargs", *WHOLE] if run["arm"] == CEILING else [])]

    def folders(self, data: str, phase: str) -> Path:
        """The class folders of a phase's images."""
        if data != "flowers":
            return self.args.data_path / f"{data}_50"
        phase = "test" if phase == "test" else "tune"
        out = self.args.output_dir / "data" / f"{data}_{phase}"
        with self.making[out]:
            if not out.exists():
                link_flowers(self.args.data_path / "flowers-102", out, SPLITS[phase])
        return out

    def call(self, log, *words) -> None:
        """Run a program on one thread; CalledProcessError if it fails."""
        command, environ = [sys.executable, *map(str, words)], os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)

    def stop(self, *received) -> None:
        """End the programs that run, and this one."""
        for process in self.processes:
            process.kill()
        os._exit(1)


def get_args_parser() -> Parser:
    parser = Parser("run.py", __doc__)
    parser.add_argument("--phase", choices=["tune", "test", "ablate"], required=True)
    parser.add_argument("--data_path", required=True, type=Path, metavar="DATA")
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="of first weights and logs")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default: results.jsonl here")
    parser.add_argument("--teacher_path", type=Path, metavar="FILE", help="of the teacher (default: from the hub)")
    parser.add_argument("--student", choices=STUDENTS, default="vit_half", help="default: %(default)s")
    parser.add_argument("--data", choices=EPOCHS, default="flowers", help="of the test (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of the test (default: 20 of flowers, 12 of cifar100)")
    parser.add_argument(
        "--lr", type=float, nargs="+", metavar="RATE", help="tune: only these, from a fitted classifier"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of the test (default: %(default)s)")
    arms = [*ARMS, *ABLATIONS]
    parser.add_argument("--arms", nargs="+", choices=arms, metavar="ARM", help="default: all of the phase")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time, each on one thread")
    parser.add_argument("main_args", nargs="*", metavar="OPTION", help="further options of main.py, after --")
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    for option in ("processes", "seeds"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option} {getattr(args, option)}: give a number from 1 up")
    if args.lr and args.phase != "tune":
        raise InputError(f"--lr {args.lr[0]:g}: has no effect with --phase {args.phase}; leave it out")
    can = ablated(args.student) if args.phase == "ablate" else STUDENTS[args.student].arms
    if args.phase != "test":  # that has other arms by default, as the finished runs say
        args.arms = args.arms or can
    if others := [arm for arm in args.arms or () if arm not in can]:
        where = f"--phase {args.phase} of --student {args.student}"
        raise InputError(f"--arms {others[0]}: is not in {where}; choose from {', '.join(can)}")
    if args.phase == "tune" and (tuned_as := STUDENTS[args.student].tuned_as):
        raise InputError(f"--student {args.student}: is trained at the settings of {tuned_as}; tune that")
    for name in ("data_path", "output_dir", "results", "teacher_path"):  # the programs run in the repository
        setattr(args, name, getattr(args, name) and getattr(args, name).absolute())
    queue = Queue(args)
    if not queue.wanted(queue.finished()):
        raise InputError(
            f"--phase {args.phase}: no such arm of --student {args.student} is tuned; run --phase tune first"
        )
    signal.signal(signal.SIGTERM, queue.stop)
    with ThreadPoolExecutor(args.processes) as pool:
        for thread in [pool.submit(queue.work) for _ in range(args.processes)]:
            thread.result()
    if queue.failed:
        raise InputError(f"--output_dir {args.output_dir}: {len(queue.failed)} runs failed; its logs/ say why")


if __name__ == "__main__":
    run_program("run.py", main)
