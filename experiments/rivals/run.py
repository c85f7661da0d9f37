#!/usr/bin/env python3
"""Train a student from the first weights of every arm; each finished run is a line of results.jsonl.

python experiments/rivals/run.py --data_path data/ --output_dir rivals/ --processes 2 -- --use_amp false

A run that stands in results.jsonl is skipped, so an interrupted queue goes on where it stopped. First every arm is
tuned, on the training images of Flowers-102 against its validation images: at least four learning rates, more while the
best is the first or the last, and both first classifiers. An arm 10 points behind the best at the first settings
stops there, unless it is one of FINAL. Then FINAL, the best rival and the ceiling are trained at their best settings
with three seeds, and evaluated on the test images. What follows -- goes to main.py. DATA holds flowers-102/ and, for
--data cifar100, cifar100_50/ (experiments/cifar100_folders.py).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository's modules
sys.path.insert(0, str(Path(__file__).parents[1]))  # and the experiments'
from rivals.arms import ARMS, CEILING, FINAL, WHOLE
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program

ROOT = Path(__file__).parents[2]
RECIPES = {"flowers": "experiments/vit_half_112.yaml:flowers", "cifar100": "experiments/vit_half_112.yaml:cifar100"}
EPOCHS = {"flowers": 20, "cifar100": 12}
FIRST = [(5e-4, "ridge"), (1e-3, "ridge")]  # what decides whether an arm goes on
GRID = [
    *FIRST,
    (5e-4, "random"),
    (1e-3, "random"),
    *((lr, how) for lr in (2e-3, 2.5e-4) for how in ("ridge", "random")),
]
BEHIND = 10  # points
SEEDS = (0, 1, 2)
KEY = ("data", "arm", "epochs", "lr", "classifier", "seed", "phase")


def key_of(row: dict) -> tuple:
    """What makes a run another run."""
    return tuple(row[name] for name in KEY)


def read_results(path: Path) -> list[dict]:
    """The finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tuned(rows: list[dict], arm: str) -> dict | None:
    """The best run of an arm's tuning."""
    found = [row for row in rows if row["phase"] == "tune" and row["arm"] == arm]
    return max(found, key=lambda row: row["accuracy"], default=None)


def tuning(rows: list[dict], epochs: int, arms: list[str]) -> Iterator[dict]:
    """The runs of the tuning, the most telling first, as far as the finished ones show that they are wanted."""
    for lr, classifier in [*GRID, *_beyond(rows, arms)]:
        for arm in arms:
            wanted = _goes_on(rows, arm) if (lr, classifier) in GRID else (lr, classifier) == _at_the_end(rows, arm)
            if wanted or (lr, classifier) in FIRST:
                yield dict(zip(KEY, ("flowers", arm, epochs, lr, classifier, 0, "tune"), strict=True))


def _beyond(rows, arms):
    """Settings beyond the grid, where an arm is best at its end."""
    return sorted({end for arm in arms if (end := _at_the_end(rows, arm))} - set(GRID))


def _at_the_end(rows, arm):
    """The next setting of an arm whose best learning rate is the largest or the smallest that it was tuned at."""
    best = tuned(rows, arm)
    if best is None or not _goes_on(rows, arm):
        return None
    rates = [row["lr"] for row in rows if row["phase"] == "tune" and row["arm"] == arm]
    if len(set(rates)) < 4 or min(rates) < best["lr"] < max(rates):
        return None
    return (best["lr"] / 2 if best["lr"] == min(rates) else best["lr"] * 2), best["classifier"]


def _goes_on(rows, arm):
    first = [row for row in rows if row["phase"] == "tune" and (row["lr"], row["classifier"]) in FIRST]
    own = [row["accuracy"] for row in first if row["arm"] == arm]
    student = [row["accuracy"] for row in first if row["arm"] != CEILING]
    return arm in (*FINAL, CEILING) or len(own) < len(FIRST) or max(own) > max(student) - BEHIND


def testing(rows: list[dict], data: str, epochs: int, arms: list[str]) -> Iterator[dict]:
    """The runs on test images, of three seeds, at the settings of the tuning."""
    rivals = [best for arm in ARMS if arm not in (*FINAL, CEILING) and (best := tuned(rows, arm))]
    wanted = [*FINAL, *(best["arm"] for best in sorted(rivals, key=lambda row: -row["accuracy"])[:1]), CEILING]
    for seed in SEEDS:
        for best in filter(None, (tuned(rows, arm) for arm in wanted if arm in arms)):
            yield dict(zip(KEY, (data, best["arm"], epochs, best["lr"], best["classifier"], seed, "test"), strict=True))


class Queue:
    """The runs that are left; several threads take them one by one."""

    def __init__(self, args):
        self.args, self.lock, self.taken = args, Lock(), set()
        self.making = defaultdict(Lock)  # of the first weights in a directory, and of a directory of data
        self.path = args.results
        self.epochs = args.epochs or EPOCHS[args.data]

    def take(self) -> dict | None:
        """The next run that is neither finished nor taken."""
        with self.lock:
            rows = read_results(self.path)
            runs = tuning(rows, EPOCHS["flowers"], self.args.arms) if self.args.phase != "test" else iter(())
            done = self.taken | {key_of(row) for row in rows}
            run = next((run for run in runs if key_of(run) not in done), None)
            if run is None and self.args.phase != "tune":
                runs = testing(rows, self.args.data, self.epochs, self.args.arms)
                run = next((run for run in runs if key_of(run) not in done), None)
            if run is not None:
                self.taken.add(key_of(run))
            return run

    def finish(self, row: dict) -> None:
        """Write a finished run down."""
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def work(self) -> None:
        """Take and do runs until none is left."""
        while run := self.take():
            print(*(f"{name} {run[name]}" for name in KEY), flush=True)
            self.finish(self.do(run))

    def do(self, run: dict) -> dict:
        """Make the first weights unless they are there, and train from them; returns the line of the results."""
        args, name = self.args, "_".join(map(str, key_of(run)))
        folder = self.folder(run["data"], run["phase"])
        words = ["--config", RECIPES[run["data"]], "--data_set", "image_folder", "--data_path", folder]
        words += ["--seed", run["seed"], "--num_workers", 0, *args.main_args]
        words += ["--model_kwargs", *WHOLE] if run["arm"] == CEILING else []
        init = args.output_dir / "init" / "_".join(map(str, (run["data"], run["phase"], run["arm"], run["seed"])))
        log = args.output_dir / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        made_first = [run["arm"], init, *(["--teacher_path", args.teacher_path] if args.teacher_path else [])]
        with log.open("w") as file:
            with self.making[init]:
                if not init.exists():
                    self.call(file, "experiments/rivals/first_weights.py", *made_first, "--", *words)
            training = args.output_dir / "runs" / name
            words += ["--initialize", init / "weights.pth", "--classifier_init", run["classifier"], "--lr", run["lr"]]
            words += [
                "--epochs",
                run["epochs"],
                "--warmup_epochs",
                run["epochs"] // 10,
                "--eval_interval",
                run["epochs"],
            ]
            words += ["--save_ckpt", "false", "--cache_images", "true", "--output_dir", training, "--overwrite", "true"]
            self.call(file, "main.py", *words)
        results, facts = (json.loads(path.read_text()) for path in (training / "results.json", init / "facts.json"))
        shutil.rmtree(training)
        before = facts["seconds"] + (facts["seconds_classifier"] if run["classifier"] == "ridge" else 0)
        return run | {
            "probe": round(facts["probe"], 2),
            "accuracy": round(results["last"]["acc1"], 2),
            "seconds_before": round(before, 1),
            "seconds_training": round(results["wall_time"], 1),
            "torch": results["versions"]["torch"],
        }

    def folder(self, data: str, phase: str) -> Path:
        """The class folders of a phase's images."""
        if data != "flowers":
            return self.args.data_path / f"{data}_50"
        folder = self.args.output_dir / "data" / f"{data}_{phase}"
        with self.making[folder]:
            if not folder.exists():
                self.call(None, "experiments/rivals/flowers_folders.py", self.args.data_path, folder, "--phase", phase)
        return folder

    def call(self, log, program: str, *words) -> None:
        """Run a program of this repository on one thread; a failure ends the queue."""
        command = [sys.executable, ROOT / program, *words]
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{program} ended with status {done.returncode}; see {log.name if log else 'above'}")


def get_args_parser() -> Parser:
    parser = Parser("run.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data_path", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--output_dir", required=True, type=Path, metavar="DIR", help="first weights, logs, class folders"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"), metavar="FILE")
    parser.add_argument(
        "--teacher_path", type=Path, metavar="FILE", help="the teacher's weights (default: from the hub)"
    )
    parser.add_argument("--phase", choices=["tune", "test", "all"], default="all")
    parser.add_argument("--data", choices=RECIPES, default="flowers", help="of the test (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of the test (default: 20 of flowers, 12 of cifar100)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time, each on one thread")
    parser.add_argument("main_args", nargs="*", metavar="OPTION", help="further options of main.py, after --")
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    if args.processes < 1:
        raise InputError(f"--processes {args.processes}: give a number from 1 up")
    for name in ("data_path", "output_dir", "results", "teacher_path"):  # the programs run in the repository
        setattr(args, name, getattr(args, name) and getattr(args, name).absolute())
    queue = Queue(args)
    with ThreadPoolExecutor(args.processes) as pool:
        for thread in [pool.submit(queue.work) for _ in range(args.processes)]:
            thread.result()


if __name__ == "__main__":
    run_program("run.py", main)
