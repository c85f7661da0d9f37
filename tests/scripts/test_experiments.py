"""The scripts of tables, figures and experiments: what they would run, and that they do run."""

import os
import shlex
import subprocess
import time
from functools import cache
from pathlib import Path

import pytest

import paper
from python_server import make_python
from training import options
from weight_selection.cli import get_args_parser as selection_parser
from weight_selection.sources.timm_models import check_name

ROOT = Path(__file__).parents[2]
TABLES = sorted(path.stem for path in (ROOT / "scripts").glob("table*.sh") if path.stem != "table01")
FIGURES = ["figure03", "figure04"]
OWN = ["evidence", "other_families"]
EVIDENCE = [name for name in paper.contents()["tables"] if name.startswith("evidence")]


def shell(script, *words, check=True, **environment):
    """Run a script; returns its finished process."""
    keep = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    command = ["bash", str(ROOT / ("experiments" if script in OWN else "scripts") / f"{script}.sh"), *words]
    result = subprocess.run(command, env=keep | environment, capture_output=True, text=True, cwd="/")
    assert not check or result.returncode == 0, result.stderr
    return result


def commands(script, *words, **environment):
    """The commands that a dry run prints, as lists of words, by program."""
    lines = [shlex.split(line) for line in shell(script, *words, DRY_RUN="1", **environment).stdout.splitlines()]
    return {
        program: [line[line.index(program) + 1 :] for line in lines if program in line]
        for program in ("main.py", "weight_selection.py")
    }


@pytest.fixture(scope="module")
def dry():
    """{script: its commands}"""
    return {script: commands(script, OUT="out") for script in [*TABLES, *FIGURES, *OWN]}


@cache
def parsed(words):
    return options.parse_args(list(words))


def parse_args(words):
    """The options of a run of main.py. Many scripts share runs."""
    return parsed(tuple(words))


def run_of(args):
    """SETTING, DATA, NAME, SEED of a run of main.py."""
    return Path(args.output_dir).relative_to("out").parts


@pytest.mark.parametrize("script", TABLES)
def test_a_dry_run_prints_the_papers_settings(dry, script):
    """Tables 13 to 15, and 11, through the recipes and the command line to the options that main.py trains with."""
    table = paper.read_table(script)
    assert dry[script]["main.py"]
    for words in dry[script]["main.py"]:
        args = parse_args(words)
        setting, data, name, seed = run_of(args)
        expected = table.recipe or paper.recipe(setting, data)
        found = {option: getattr(args, option) for option in expected}
        assert found == expected, words
        assert args.seed == int(seed)
        assert args.data_set.lower() == paper.contents()["data_sets"].get(data, data).lower()
        assert args.model == ("vit_tiny_clip" if name == "clip" else setting)


@pytest.mark.parametrize("script", TABLES)
def test_a_table_runs_its_cells_and_no_others(dry, script):
    cells = {cell.run for cell in paper.read_table(script).cells}
    runs = {"/".join(run_of(parse_args(words))[:3]) for words in dry[script]["main.py"]}
    assert runs == cells


def test_the_evidence_runs_the_cells_of_its_tables(dry):
    cells = {cell.run for name in EVIDENCE for cell in paper.read_table(name).cells}
    runs = {"/".join(run_of(parse_args(words))[:3]) for words in dry["evidence"]["main.py"]}
    assert runs == cells


def test_other_families_run_the_cells_of_their_table_and_the_teachers(dry):
    cells = {cell.run for cell in paper.read_table("other_families").cells}
    runs = ["/".join(run_of(parse_args(words))[:3]) for words in dry["other_families"]["main.py"]]
    teachers = {f"{teacher}/cifar100_first/random" for teacher in ("resnet18d", "mixer", "convnext")}
    assert set(runs) == cells | teachers
    assert {run: runs.count(run) for run in runs} == dict.fromkeys(cells, 3) | dict.fromkeys(teachers, 3)  # done once
    (words,) = commands("other_families", "mixer_half", "selected", OUT="out", SEEDS="0")["weight_selection.py"]
    assert words[words.index("--pretrained_path") + 1] == "out/mixer/cifar100_first/random/0/checkpoint-best.pth"


def test_the_same_run_is_the_same_command_in_every_table(dry):
    seen = {}
    for script, programs in dry.items():
        for words in programs["main.py"]:
            directory = words[words.index("--output_dir") + 1]
            assert seen.setdefault(directory, words) == words, script


@pytest.mark.parametrize("script", [*TABLES, *FIGURES, *OWN])
def test_every_initial_file_is_selected_before_it_is_trained_from(dry, script):
    written = {words[words.index("--output_dir") + 1] for words in dry[script]["weight_selection.py"]}
    used = {words[words.index("--initialize") + 1] for words in dry[script]["main.py"] if "--initialize" in words}
    assert used == written


def test_selections_are_those_of_the_tables(dry):
    """What each initial file is selected from and how; a name means the same in every table."""
    seen = {}
    for programs in dry.values():
        for words in programs["weight_selection.py"]:
            args = selection_parser().parse_args(words)
            check_name(args.pretrained_model, "--pretrained_model")
            setting, name = Path(args.output_dir).parts[-2:]
            facts = (args.pretrained_model, args.student, args.layer_selection, args.element_selection)
            facts += (tuple(args.exclude), args.seed)
            assert seen.setdefault((setting, name), facts) == facts
    s, c = "vit_small_patch16_224.augreg_in21k", "convnext_tiny.fb_in22k"
    base, large = s.replace("small", "base"), s.replace("small", "large")
    tiny, clip = s.replace("small", "tiny"), "vit_base_patch16_clip_224.openai"
    expected = {
        ("vit_tiny", "selected"): (s, "vit_tiny", "first_n", "uniform", (), None),
        ("convnext_femto", "selected"): (c, "convnext_femto", "first_n", "uniform", (), None),
        ("vit_tiny", "consecutive"): (s, "vit_tiny", "first_n", "consecutive", (), None),
        ("vit_tiny", "random_consistent-2"): (s, "vit_tiny", "first_n", "random", (), 2),
        ("convnext_femto", "random_inconsistent-1"): (c, "convnext_femto", "first_n", "random_inconsistent", (), 1),
        ("vit_tiny", "selected_deit"): ("deit_small_patch16_224.fb_in1k", "vit_tiny", "first_n", "uniform", (), None),
        ("vit_tiny", "selected_vit_base"): (base, "vit_tiny", "first_n", "uniform", (), None),
        ("vit_tiny", "clip"): (clip, "vit_tiny_clip", "first_n", "uniform", (), None),
        ("vit_tiny", "mae"): ("vit_base_patch16_224.mae", "vit_tiny", "first_n", "uniform", (), None),
        ("vit_tiny", "dino"): ("vit_base_patch16_224.dino", "vit_tiny", "first_n", "uniform", (), None),
        ("vit_a", "uniform_layers"): (s, "vit_a", "uniform", "uniform", (), None),
        ("vit_tiny", "l1"): (s, "vit_tiny", "first_n", "l1", (), None),
        ("convnext_femto", "magnitude"): (c, "convnext_femto", "first_n", "magnitude", (), None),
        ("vit_tiny", "selected_vit_large"): (large, "vit_tiny", "first_n", "uniform", (), None),
        ("vit_tiny", "large_last_n"): (large, "vit_tiny", "last_n", "uniform", (), None),
        ("vit_tiny", "no_norm"): (s, "vit_tiny", "first_n", "uniform", ("norm",), None),
        ("vit_a", "tiny_mid_n"): (tiny, "vit_a", "mid_n", "uniform", (), None),
    }
    assert {key: seen[key] for key in expected} == expected


def test_methods_are_those_of_the_tables(dry):
    methods = {}
    for programs in dry.values():
        for args in map(parse_args, programs["main.py"]):
            _, data, name, _ = run_of(args)
            methods[data, name] = (
                args.init,
                args.distillation,
                args.distillation_alpha,
                args.teacher,
                args.linear_probe,
            )
    s, deit = "vit_small_patch16_224.augreg_in21k", "deit_small_patch16_224.fb_in1k"
    assert methods["cifar100", "mimetic"] == ("mimetic", "none", 1, None, False)
    assert methods["cifar100", "xavier"] == ("xavier", "none", 1, None, False)
    assert methods["cifar100", "kaiming"] == ("kaiming", "none", 1, None, False)
    assert methods["imagenet", "logit_distilled"] == ("timm", "logit", 1, deit, False)
    assert methods["imagenet", "logit_distilled_selected"] == ("timm", "logit", 1, deit, False)
    assert methods["cifar100", "feature_distilled"] == ("timm", "feature", 1, s, False)
    assert methods["cifar100", "feature_distilled_selected"] == ("timm", "feature", 1, s, False)
    assert methods["cifar100", "linear_probe_random"] == ("timm", "none", 1, None, True)


def test_linear_probing_is_maes_recipe(dry):
    for args in map(parse_args, dry["table09"]["main.py"]):
        assert (args.batch_size, args.total_batch_size, args.min_lr, args.momentum) == (512, 16384, 0, 0.9)
        assert (args.scale, args.hflip) == ([0.08, 1.0], 0.5)
        assert (args.opt, args.weight_decay, args.epochs, args.warmup_epochs) == ("lars", 0, 90, 10)
        assert args.lr == pytest.approx(0.1 * args.total_batch_size / 256)
        assert (args.aa, args.color_jitter, args.reprob, args.mixup, args.cutmix) == ("none", 0, 0, 0, 0)
        assert (args.smoothing, args.drop_path) == (0, 0)


def test_figure_4_keeps_the_warm_ups_share(dry):
    lengths = {}
    for args in map(parse_args, dry["figure04"]["main.py"]):
        _, data, name, _ = run_of(args)
        lengths[data, name] = (args.epochs, args.warmup_epochs)
        if name.startswith("finetuned_"):
            assert args.finetune == f"out/vit_tiny/imagenet/pretrained_{name.split('_')[1]}/0/checkpoint-best.pth"
    assert lengths["cifar100", "random"] == lengths["cifar100", "finetuned_60"] == (300, 50)
    assert lengths["cifar100", "selected_100"] == (100, 17) and lengths["imagenet", "pretrained_60"] == (60, 10)
    assert all(abs(warmup - epochs / 6) <= 0.5 for epochs, warmup in lengths.values())


# ---------------------------------------------------------------------------------------------------------
# The environment and the arguments


def directories(programs):
    return [words[words.index("--output_dir") + 1] for words in programs["main.py"]]


def test_arguments_choose_runs():
    both = [f"results/vit_tiny/flowers/{name}/0" for name in ("random", "selected")]
    assert directories(commands("table02", "vit_tiny", "flowers")) == both
    assert directories(commands("table02", "vit_tiny", "flowers", "selected")) == both[1:]
    assert len(directories(commands("table02", "vit_tiny", "flowers", "pets"))) == 4
    assert len(directories(commands("table02", "flowers", "vit_tiny", "convnext_femto"))) == 4


@pytest.mark.parametrize(
    ("words", "odd"),
    [
        (["vit_tyny"], "vit_tyny"),
        (["vit_tiny", "digits"], "digits"),
        (["vit_tiny", "selected", "randon", "flowers"], "randon"),
        (["flowers", "pest", "pets", "cars"], "pest cars"),
    ],
)
def test_arguments_that_match_nothing_are_refused(words, odd):
    """Each of them, before anything is run."""
    result = shell("table02", *words, check=False, DRY_RUN="1")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.splitlines()[-1] == f"scripts/table02.sh: error: {odd}: matches none of the runs above"
    assert "vit_tiny flowers random" in result.stderr


def test_seeds_and_further_options():
    programs = commands("table12", "cifar10", "random", SEEDS="3 4", MAIN_ARGS="--batch_size 256 --num_workers 16")
    assert directories(programs) == [f"results/vit_tiny/cifar10/random/{seed}" for seed in (3, 4)]
    for words, seed in zip(programs["main.py"], (3, 4), strict=True):
        args = parse_args(words)
        assert (args.seed, args.batch_size, args.num_workers) == (seed, 256, 16)


def test_random_selection_is_drawn_three_times():
    programs = commands("table03", "vit_tiny", "random_consistent")
    assert [words[words.index("--seed") + 1] for words in programs["weight_selection.py"]] == ["0", "1", "2"]
    assert directories(programs) == [f"results/vit_tiny/cifar100/random_consistent/{seed}" for seed in range(3)]
    files = [words[words.index("--initialize") + 1] for words in programs["main.py"]]
    assert files == [f"results/init/vit_tiny/random_consistent-{seed}" for seed in range(3)]


def test_data_directories():
    words = commands("table02", "vit_tiny", "random", DATA="/d")["main.py"]
    paths = {run_of_words(w): w[w.index("--data_path") + 1] for w in words}
    assert paths["imagenet"] == "/d/imagenet" and set(paths.values()) == {"/d", "/d/imagenet"}
    (words,) = commands("table02", "vit_tiny", "random", "imagenet", IMAGENET="/i")["main.py"]
    assert parse_args(words).data_path == "/i"


def run_of_words(words):
    return Path(words[words.index("--output_dir") + 1]).parts[-3]


def test_a_number_of_processes_that_is_none():
    for wrong in ("0", "8x"):
        result = shell("table12", "cifar10", check=False, DRY_RUN="1", NPROC=wrong)
        assert (result.returncode, result.stderr) == (
            2,
            f"scripts/table12.sh: error: NPROC={wrong}: give the number of processes\n",
        )


def test_processes():
    line = shell("table12", "cifar10", "random", DRY_RUN="1", NPROC="4", PYTHON="py").stdout
    assert line.startswith("py -m torch.distributed.run --standalone --nproc_per_node=4 main.py --config")
    line = shell("table12", "cifar10", "random", DRY_RUN="1", LAUNCH="srun torchrun --nnodes=2").stdout
    assert line.startswith("srun torchrun --nnodes=2 main.py --config")


def test_teachers_from_disk(tmp_path):
    (tmp_path / "vit_small_patch16_224.augreg_in21k.npz").touch()
    words = commands("table04", "cifar100", "feature_distilled_selected", TEACHERS=str(tmp_path))
    file = f"{tmp_path}/vit_small_patch16_224.augreg_in21k.npz"
    assert words["weight_selection.py"][0][words["weight_selection.py"][0].index("--pretrained_path") + 1] == file
    assert parse_args(words["main.py"][0]).teacher_path == file


def test_a_teacher_that_is_not_there_is_refused(tmp_path):
    result = shell("table08", check=False, DRY_RUN="1", TEACHERS=str(tmp_path))
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"TEACHERS={tmp_path}: holds no vit_small_patch16_224.augreg_in21k.safetensors" in result.stderr


def test_finished_runs_are_skipped_and_others_not(tmp_path):
    done = tmp_path / "vit_tiny" / "cifar10" / "random" / "0"
    done.mkdir(parents=True)
    (done / "results.json").touch()
    (tmp_path / "init" / "vit_tiny" / "selected").mkdir(parents=True)
    (tmp_path / "init" / "vit_tiny" / "selected" / "vit.pth").touch()
    programs = commands("table12", "cifar10", OUT=str(tmp_path))
    assert not programs["weight_selection.py"]
    assert directories(programs) == [f"{tmp_path}/vit_tiny/cifar10/{name}/0" for name in ("mimetic", "selected")]


def test_a_dry_run_prints_tables_and_plots_too():
    lines = {
        script: [
            line.split("scripts/")[1] for line in shell(script, DRY_RUN="1").stdout.splitlines() if "scripts/" in line
        ]
        for script in ("table12", "figure03", "figure04", "figure05", "table01", "evidence")
    }
    assert lines["table12"] == ["collect_results.py table12 results"]
    assert [line.split()[0] for line in lines["figure03"]] == ["plot_curves.py"] * 2
    assert lines["figure04"] == ["plot_epochs.py results --output results/figure04.png"]
    assert [line.split()[0] for line in lines["figure05"]] == ["plot_attention.py"]
    assert lines["table01"] == ["print_configurations.py"]
    assert lines["evidence"] == [f"collect_results.py {name} results" for name in EVIDENCE]


def test_fine_tuning_waits_for_pretraining(tmp_path):
    out = shell("figure04", "finetuned_60", OUT=str(tmp_path)).stdout
    assert "skipped: vit_tiny cifar100 finetuned_60, seed 0: waits for" in out and "main.py" not in out


# ---------------------------------------------------------------------------------------------------------
# SLURM


def test_slurm_starts_torchrun_on_every_node(tmp_path):
    """With a scontrol that expands the nodes, as in a real allocation."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n')
    scontrol.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "80",
        "PYTHON": "py",
    }
    script = str(ROOT / "scripts" / "table12.sh")
    line = shell("slurm", script, "cifar10", "random", DRY_RUN="1", NPROC="4", **environment).stdout.splitlines()[0]
    assert line.startswith(
        "srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task=80 "
        "py -m torch.distributed.run --nnodes=2 --nproc_per_node=4 "
        "--rdzv_id=77 --rdzv_backend=c10d --rdzv_endpoint=node1:29500 main.py --config recipes/vit_tiny.yaml:cifar10"
    )
    assert parse_args(shlex.split(line)[shlex.split(line).index("main.py") + 1 :]).total_batch_size == 512


def test_slurm_job_whose_time_is_over_stops_its_steps_and_queues_itself_again(tmp_path):
    """With a scancel that ends the script as a stopped run would, and a scontrol that notes what it is told."""
    (tmp_path / "long.sh").write_text(f"trap 'exit 75' USR1; echo $$ >{tmp_path}/pid; sleep 30 & wait")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/told\n')
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/told\nkill -USR1 $(cat {tmp_path}/pid)\n')
    for name in ("scontrol", "scancel"):
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1"}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "scripts" / "slurm.sh"), str(tmp_path / "long.sh")]
    with subprocess.Popen(command, env=os.environ | environment) as job:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        job.terminate()
        assert job.wait(10) == 75
    assert (tmp_path / "told").read_text().splitlines()[1:] == ["--signal=TERM 77", "requeue 77"]


def test_slurm_outside_of_a_job_says_how():
    result = shell("slurm", "scripts/table12.sh", check=False)
    assert result.returncode == 2 and "sbatch" in result.stderr and len(result.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------
# Smoke: a few of the runs end to end; scripts/smoke_all.sh has all


@pytest.fixture(scope="module")
def smoke_out(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def smoke(smoke_out):
    """``smoke(script, *words)`` runs a script with SMOKE=1 into ``smoke_out``; returns what it prints."""
    with make_python(smoke_out) as python:
        environment = {"SMOKE": "1", "SEEDS": "0", "OUT": str(smoke_out), "PYTHON": str(python)}
        yield lambda script, *words: shell(script, *words, **environment).stdout


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("table04", ["cifar100", "feature_distilled_selected"]),
        ("table05", ["stl10", "clip"]),
        ("table09", ["convnext_femto", "linear_probe_selected"]),
    ],
)
def test_smoke(smoke, smoke_out, script, words):
    out = smoke(script, *words)
    measured = [line for line in out.splitlines() if line.endswith("|") and "(1) [1]" in line]
    assert len(measured) == 1  # one cell, marked as not of the paper's recipe
    assert "data_set image_folder" in out
    assert f"SMOKE=1 OUT={smoke_out} bash scripts/{script}.sh" in out
    again = smoke(script, *words)
    assert "main.py" not in again and "done: " in again


def test_smoke_of_figure_5(smoke, smoke_out):
    smoke("figure05")
    assert (smoke_out / "smoke" / "figure05.png").stat().st_size > 10_000


def test_smoke_of_another_family(smoke, smoke_out):
    out = smoke("other_families", "mixer_half", "selected")
    results = sorted((smoke_out / "smoke").glob("mixer*/*/*/0/results.json"))
    assert [path.parts[-5:-1] for path in results] == [
        ("mixer", "cifar100_first", "random", "0"),
        ("mixer_half", "cifar100_last", "selected", "0"),
    ]
    assert f"--initialize {smoke_out}/smoke/init/mixer_half/selected.pth" in out


def test_an_interrupted_run_goes_on(smoke, smoke_out):
    """As if it had been stopped after the first of its two epochs."""
    words = ["table12", "stl10", "mimetic"]
    smoke(*words)
    run = smoke_out / "smoke" / "vit_tiny" / "stl10" / "mimetic" / "0"
    whole = (run / "log.txt").read_text().splitlines()
    (run / "results.json").unlink()
    (run / "checkpoint-1.pth").unlink()
    assert "checkpoint-0.pth, written after epoch 0" in smoke(*words)
    again = (run / "log.txt").read_text().splitlines()
    assert again[0] == whole[0] and len(again) == 2 and (run / "results.json").exists()


def test_two_scripts_may_want_the_same_selection_at_once(tmp_path):
    """With an interpreter that takes its time to select and does nothing else."""
    slow = tmp_path / "python"
    slow.write_text('#!/bin/sh\n[ $1 != weight_selection.py ] || { sleep 0.5; touch "$3/vit.pth"; }\n')
    slow.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(slow), "OUT": str(tmp_path)}
    command = ["bash", str(ROOT / "scripts" / "table02.sh"), "vit_tiny", "selected"]
    both = [
        subprocess.Popen([*command, data], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for data in ("flowers", "pets")
    ]
    ended = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert [out.count("main.py") for out, _ in ended] == [1, 1]
    assert sum(out.count("weight_selection.py") for out, _ in ended) == 1
