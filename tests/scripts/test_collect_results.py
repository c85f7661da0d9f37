"""What runs left, beside the paper's figures: the collected tables and the figures drawn of them."""

import copy
import csv
import json
import re
import statistics

import matplotlib.image
import pytest

import collect_results
import paper
import plot_curves
import plot_epochs
from helpers import read_results
from planned import planned_runs
from runs import read_run
from training.options import CANNOT_CHANGE_RESULT, OPTIONS, complete_warmup, default_options, get_args_parser
from weight_selection.cli import RECORDED

TABLES = paper.contents()["tables"]


@pytest.fixture(scope="session")
def real_results(train, tmp_path_factory):
    """results.json and log.txt as main.py writes them."""
    directory = tmp_path_factory.mktemp("real")
    train("--output_dir", directory)
    return read_results(directory), (directory / "log.txt").read_text()


SCRIPTS = {cell.run: paper.read_table(name).script for name in TABLES for cell in paper.read_table(name).cells}


@pytest.fixture
def make_run(real_results, tmp_path):
    """``make_run(path, seed, best, last)`` leaves a run in OUT as the table's script makes it, but for options given.

    ``images`` are the numbers of images to train and to test on; ``first_weights`` changes their provenance.
    """

    def make(path, seed, best, last=None, images=None, first_weights=None, **options):
        results, log = copy.deepcopy(real_results[0]), real_results[1]
        if path.startswith(("vit_tiny/", "vit_a/", "convnext_femto/")):
            planned = planned_runs(SCRIPTS.get(path, "scripts/figure04.sh"))[path]
            results["args"] |= planned.options.plain()
            images = images or paper.images(path.split("/")[1])
            results |= {"train_images": images[0], "test_images": images[1]}
            if planned.selection is not None:
                results["first_weights"] = provenance(planned.selection, seed)
                results["first_weights"]["options"] |= first_weights or {}
        results["args"] |= {"seed": seed} | options
        results |= {key: results["args"][key] for key in ("data_set", "seed", "epochs")}
        results["best"]["acc1"], results["last"]["acc1"] = best, best - 1 if last is None else last
        directory = tmp_path / "out" / path / str(seed)
        directory.mkdir(parents=True)
        (directory / "results.json").write_text(json.dumps(results))
        (directory / "log.txt").write_text(log)
        return directory

    (tmp_path / "out").mkdir()
    return make


def provenance(selection, seed):
    """What weight_selection.py writes about first weights that it selects by these options."""
    options = {name: getattr(selection, name) for name in RECORDED}
    options |= {"fused_qkv": selection.fused_qkv} if selection.fused_qkv != "parts" else {}
    teacher, student = selection.pretrained_model, selection.student
    return {
        "teacher": {"name": teacher, "model": teacher, "kwargs": selection.teacher_kwargs},
        "student": {"name": student, "kwargs": selection.student_kwargs},
        "options": options | {"seed": 0 if selection.seed is None else seed},
    }


@pytest.fixture
def collect(cli, tmp_path, capsys):
    """``collect(table)`` gives what collect_results.py prints."""

    def run(table, *words):
        assert cli(collect_results.main, table, tmp_path / "out", *words) is None
        return capsys.readouterr().out

    return run


def grid(text):
    """{(row, measure): [cells]} of a printed table."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    cells, label = {}, ""  # a row is named in the first of its lines
    for row, measure, *values in lines[2:]:
        label = row or label
        cells[label, measure] = values
    return cells


# ---------------------------------------------------------------------------------------------------------
# Tables


def test_mean_deviation_seeds_and_difference(make_run, collect):
    for seed, best, last in ((0, 72.0, 71.0), (1, 72.6, 71.4), (10, 73.5, 73.4)):
        make_run("vit_tiny/cifar100/random", seed, best, last)
    make_run("convnext_femto/cifar100/random", 0, 81.36, 81.2)
    cells = grid(collect("table03"))
    row = "timm default (truncated normal)"
    assert cells[row, "best epoch"] == ["72.7 ± 0.8 (3)", "81.4 (1)"]
    assert cells[row, "last epoch"] == ["71.9 ± 1.3 (3)", "81.2 (1)"]
    assert cells[row, "paper"] == ["72.3", "81.4"]
    assert cells[row, "best - paper"] == ["+0.4", "+0.0"]
    assert cells["Xavier", "best epoch"] == cells["Xavier", "best - paper"] == ["-", "-"]


def test_median_where_the_paper_has_one(make_run, collect):
    run = "vit_tiny/cifar100/random_consistent"
    for seed, best in ((0, 80.0), (1, 81.9)):
        make_run(run, seed, best)
    text = collect("table03")
    assert re.search(r"table03\.sh vit_tiny cifar100 random_consistent  # 2 of 3 seeds so far", text)
    make_run(run, 2, 82.0)
    text = collect("table03")
    cells = grid(text)
    row = "weight selection (random with consistency)"
    std = statistics.stdev([80.0, 81.9, 82.0])
    assert cells[row, "best epoch"][0] == f"81.9 ± {std:.1f} (median of 3)"
    assert cells[row, "best - paper"][0] == "+0.2"
    assert "vit_tiny cifar100 random_consistent" not in text


def test_commands_for_what_is_missing(make_run, collect, tmp_path):
    make_run("vit_tiny/cifar100/selected", 0, 81.0)
    unfinished = make_run("vit_tiny/cifar100/selected_vit_base", 0, 77.0)
    (unfinished / "results.json").unlink()
    (make_run("vit_tiny/cifar100/selected_vit_large_whole", 0, 77.0)).rename(unfinished.parent / "notes")
    text = collect("8")
    commands = text.split("```")[1].strip().splitlines()
    start = f"OUT={tmp_path / 'out'} bash scripts/table08.sh vit_tiny cifar100"
    missing = ["selected_vit_base", "selected_vit_large_whole", "selected_vit_large"]
    assert commands == [f"{start} {name}" for name in missing]
    make_run("vit_tiny/cifar100/selected_vit_base", 1, 77.0)
    make_run("vit_tiny/cifar100/selected_vit_large_whole", 3, 77.0)
    make_run("vit_tiny/cifar100/selected_vit_large", 0, 77.0)
    assert "```" not in collect("table08")


def test_a_row_may_have_another_run_in_each_column(make_run, collect):
    make_run("vit_tiny/imagenet/logit_distilled", 0, 74.0)
    make_run("vit_tiny/cifar100/feature_distilled", 0, 78.0)
    assert grid(collect("table04"))["distillation", "best epoch"] == ["74.0 (1)", "78.0 (1)"]


def test_runs_of_another_recipe_are_marked_and_not_compared(make_run, collect):
    make_run("vit_tiny/cifar100/random", 0, 72.0)
    make_run("vit_tiny/cifar100/random", 1, 30.0, epochs=3, data_set="image_folder")
    make_run("vit_tiny/cifar100/selected", 0, 80.0, total_batch_size=64)
    text = collect("table07")
    cells = grid(text)
    assert cells["random init", "best epoch"][0] == "51.0 ± 29.7 (2) [1]"
    assert cells["weight selection", "best epoch"][0] == "80.0 (1) [2]"
    assert cells["random init", "best - paper"][0] == cells["weight selection", "best - paper"][0] == "-"
    marks = "data_set image_folder (paper: CIFAR100), epochs 3 (paper: 300)"
    assert f"- [1] vit_tiny/cifar100/random, seed 1: {marks}" in text
    assert "- [2] vit_tiny/cifar100/selected, seed 0: total_batch_size 64 (paper: 512)" in text


def test_linear_probing_and_longer_training_have_recipes_of_their_own(make_run, collect):
    probe = paper.read_table("table09").recipe
    make_run("vit_tiny/cifar100/linear_probe_random", 0, 13.0, **probe)
    make_run("vit_tiny/cifar100/linear_probe_selected", 0, 28.0, **probe | {"lr": 0.1})
    make_run("vit_tiny/imagenet_long/random", 0, 76.0)
    make_run("convnext_femto/imagenet_long/random", 0, 77.0, mixup=0.8)
    cells = grid(collect("table09"))
    assert cells["random init", "best - paper"][0] == "-0.5"
    assert cells["weight selection", "best epoch"][0] == "28.0 (1) [1]"
    cells = grid(collect("table11"))
    assert cells["random init (600 epochs)", "best - paper"] == ["-0.3", "-"]
    assert cells["random init (600 epochs)", "best epoch"] == ["76.0 (1)", "77.0 (1) [1]"]


def other_value(option, value):
    """A value of an option that is not this one."""
    if option.choices:
        return next(choice for choice in option.choices if choice != value)
    if option.type is bool:
        return not value
    if option.type in (str, dict):
        return "another" if option.type is str else {"depth": 3}
    return [0.5, 0.6] if option.nargs else (value or 0) + 1


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"seed"}))
def test_a_run_with_another_value_of_an_option_is_marked_if_that_can_change_its_result(make_run, name):
    run, script = "vit_tiny/cifar100/random", "scripts/table03.sh"
    usual = planned_runs(script)[run].options.plain()[name]
    directory = make_run(run, 0, 72.0, **{name: other_value(OPTIONS[name], usual)})
    marks = paper.deviations(run, read_run(directory), script, paper.recipe("vit_tiny", "cifar100"))
    unmarked = CANNOT_CHANGE_RESULT | {"teacher_path", "update_freq", "device", "amp_dtype", "world_size"}
    assert [mark.split()[0] for mark in marks] == ([] if name in unmarked else [name])


@pytest.mark.parametrize(
    ("run", "changes", "mark"),
    [
        ("random", {"images": (5000, 10000)}, "train_images 5000 (paper: 50000)"),
        ("random", {"images": (50000, 1000)}, "test_images 1000 (paper: 10000)"),
        ("random", {"initialize": "init/vit.pth"}, "initialize init/vit.pth (recipe: None)"),
        ("selected", {"initialize": None}, "initialize None (recipe: a file)"),
        ("selected", {"first_weights": {"element_selection": "l1"}}, "element_selection l1 (recipe: uniform)"),
        ("selected", {"first_weights": {"layer_selection": "mid_n"}}, "layer_selection mid_n (recipe: first_n)"),
        ("selected", {"first_weights": {"exclude": ["norm"]}}, "exclude ['norm'] (recipe: [])"),
        ("random_consistent", {"first_weights": {"seed": 5}}, "seed 5 (recipe: 0)"),
        ("selected", {"first_weights": {"fused_qkv": "whole"}}, "fused_qkv whole (recipe: parts)"),
        ("selected", {"first_weights": {"dtype": "float16"}}, "dtype float16 (recipe: keep)"),
        ("selected", {"first_weights": {"classifier": ["head"]}}, "classifier ['head'] (recipe: None)"),
        ("selected", {"first_weights": {"allow_unused": True}}, "allow_unused True (recipe: False)"),
        ("selected", {"first_weights": {"include_head": True}}, "include_head True (recipe: False)"),
    ],
)
def test_other_images_and_other_first_weights_are_marked(make_run, run, changes, mark):
    run, script = f"vit_tiny/cifar100/{run}", "scripts/table03.sh"
    directory = make_run(run, 0, 72.0, **changes)
    assert paper.deviations(run, read_run(directory), script, paper.recipe("vit_tiny", "cifar100")) == [mark]


def test_first_weights_of_another_teacher_or_of_none_that_is_known_are_marked(make_run):
    run, script = "vit_tiny/cifar100/selected", "scripts/table03.sh"
    path = make_run(run, 0, 72.0) / "results.json"
    recipe, results = paper.recipe("vit_tiny", "cifar100"), json.loads(path.read_text())

    def marks():
        path.write_text(json.dumps(results))
        return paper.deviations(run, read_run(path.parent), script, recipe)

    results["first_weights"]["teacher"] |= {"name": "vit_small_patch16_224_in21k"}
    assert marks() == [], "timm's old name of the same weights"
    results["first_weights"]["teacher"] |= {"model": "vit_small_patch16_224.dino"}
    assert marks()[0].startswith("pretrained_model vit_small_patch16_224_in21k (recipe: ")
    del results["first_weights"]
    assert marks() == ["first weights of unknown origin (no provenance beside --initialize)"]


def test_our_own_tables_say_what_was_measured(make_run, collect):
    make_run("vit_half_112/flowers/random", 0, 30.0, epochs=20, data_set="flowers")
    make_run("vit_half_112/flowers/selected", 0, 40.0, epochs=20, data_set="flowers")
    make_run("vit_half_112/flowers/selected", 1, 42.0, epochs=5, data_set="flowers")
    text = collect("evidence_distillation")
    assert grid(text) == {
        (row, measure): [value]
        for row, values in {
            "baseline": ("30.0 (1)", "29.0 (1)"),
            "distillation": ("-", "-"),
            "weight selection": ("41.0 ± 1.4 (2)", "40.0 ± 1.4 (2)"),
            "distillation and weight selection": ("-", "-"),
        }.items()
        for measure, value in zip(("best epoch", "last epoch"), values, strict=True)
    }
    assert re.search(
        r"- 20 epochs of flowers by adamw at lr \S+, batch \d+ \(48 images\): \S+random, \S+selected\n", text
    )
    assert re.search(r"- 5 epochs of flowers by adamw at lr \S+, batch \d+ \(48 images\): \S+selected\n", text)
    assert "bash experiments/evidence.sh vit_half_112 flowers feature_distilled\n" in text
    assert "paper" not in text


def test_csv_has_a_line_per_cell(make_run, collect, cli, tmp_path):
    for seed, best, last in ((0, 80.0, 79.0), (1, 81.0, 79.5), (2, 81.8, 81.8)):
        make_run("vit_tiny/cifar100/random_consistent", seed, best, last)
    make_run("vit_tiny/cifar100/xavier", 0, 70.0, epochs=3)
    path = tmp_path / "table.csv"
    collect("table03", "--csv", path)
    rows = {row["run"]: row for row in csv.DictReader(path.read_text().splitlines())}
    assert len(rows) == 14
    command = f"OUT={tmp_path / 'out'} bash scripts/table03.sh vit_tiny cifar100"
    assert rows["vit_tiny/cifar100/random_consistent"] == {
        "table": "table03",
        "row": "weight selection (random with consistency)",
        "column": "ViT-T",
        "run": "vit_tiny/cifar100/random_consistent",
        "seeds": "0 1 2",
        "best_mean": "80.933",
        "best_std": "0.902",
        "best_median": "81.0",
        "last_mean": "80.1",
        "last_std": "1.493",
        "last_median": "79.5",
        "statistic": "median",
        "paper": "81.7",
        "difference": "-0.7",
        "deviations": "",
        "command": f"{command} random_consistent",
    }
    marked = rows["vit_tiny/cifar100/xavier"]
    assert (marked["best_mean"], marked["best_std"], marked["difference"]) == ("70.0", "", "")
    assert marked["deviations"] == "vit_tiny/cifar100/xavier, seed 0: epochs 3 (paper: 300)"
    empty = rows["convnext_femto/cifar100/xavier"]
    assert (empty["seeds"], empty["best_mean"], empty["paper"]) == ("", "", "82.8")

    before = path.read_bytes()
    message = cli(collect_results.main, "table07", tmp_path / "out", "--csv", path)
    assert message == f"--csv {path}: exists; add --overwrite to replace it"
    assert path.read_bytes() == before
    collect("table07", "--csv", path, "--overwrite")
    assert path.read_bytes() != before


@pytest.mark.parametrize("name", ["table03", "table3", "03", "3"])
def test_spellings_of_a_table(name):
    assert paper.read_table(name).name == "table03"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table13", "."), "TABLE table13: there is none; choose from table02, "),
        (("table03", "nowhere"), "OUT nowhere: no such directory; "),
        (("table03", ".", "--overwrite"), "--overwrite: has no effect without --csv; leave it out"),
        (("table03", ".", "--csv", "nowhere/x.csv"), "cannot write nowhere/x.csv: No such file or directory"),
        (("table03",), "the following arguments are required: OUT; see --help"),
    ],
)
def test_refusals(cli, words, message):
    assert cli(collect_results.main, *words).startswith(message)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:100], "Expecting"),
        (lambda text: "", "Expecting value"),
        (lambda text: "[1]", "list indices"),
        (lambda text: text.replace('"last"', '"least"'), "'last' is missing"),
        (lambda text: re.sub(r'"acc1": [\d.]+', '"acc1": NaN', text), "best acc1 is nan"),
        (lambda text: re.sub(r'"acc1": [\d.]+', '"acc1": "77"', text), "not supported"),
        (lambda text: re.sub(r'"data_set": "\w+"', '"data_set": null', text), "data_set is None"),
        (lambda text: "\udcff", "utf-8"),
        (lambda text: "[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_result_is_named(make_run, cli, tmp_path, damage, reason):
    path = make_run("vit_tiny/cifar100/selected", 0, 81.0) / "results.json"
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    message = cli(collect_results.main, "table08", tmp_path / "out")
    assert message.startswith(f"{path}: not a whole results.json of main.py (")
    assert reason in message


# ---------------------------------------------------------------------------------------------------------
# The paper's figures


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_well_formed(name):
    table = TABLES[name]
    assert set(table) <= {"title", "script", "columns", "rows", "notes", "recipe"}
    assert re.fullmatch(rf"scripts/{name}\.sh|experiments/(evidence|other_families)\.sh", table["script"])
    for row in table["rows"]:
        assert set(row) <= {"row", "run", "paper", "statistic"}
        own = "each of q, k and v" in row["row"]  # beside the release's way, which the paper measured
        assert ("paper" in row) == (name.startswith("table") and not own)
        assert len(row.get("paper", table["columns"])) == len(table["columns"])
        assert row.get("statistic", "median") == "median"
    cells = paper.read_table(name).cells
    assert len({(cell.row, cell.column) for cell in cells}) == len({cell.run for cell in cells}) == len(cells)
    for cell in cells:
        setting, data, _ = cell.run.split("/")
        assert re.fullmatch(r"[a-z0-9_/]+", cell.run)
        if cell.paper is not None:
            assert 0 < cell.paper < 100
            assert cell.paper == round(cell.paper, 1)
            assert paper.recipe(setting, data)


def test_a_run_has_one_value_in_all_tables_but_for_known_discrepancies():
    values = {}
    for name in TABLES:
        for cell in paper.read_table(name).cells:
            values.setdefault(cell.run, {})[name] = cell.paper
    differing = {run: by_table for run, by_table in values.items() if len(set(by_table.values())) > 1}
    for run, known in paper.contents()["discrepancies"].items():
        assert {name: value for name, value in differing.pop(run).items() if value is not None} == known
    assert not differing


def test_recipes_are_options_of_main_and_its_defaults():
    parser = get_args_parser()
    basic, defaults = paper.contents()["basic_recipe"], complete_warmup(default_options())
    assert parser.get_default("opt_betas") is None, "the optimiser's own, which are the paper's"
    for name, value in basic.items():
        if name != "total_batch_size":
            assert getattr(defaults, name) == value, name
    names = {name for data in paper.contents()["recipes"].values() for options in data.values() for name in options}
    assert names <= {action.dest for action in parser._actions}
    assert paper.recipe("vit_a", "cifar100") == paper.recipe("vit_tiny", "cifar100")
    assert paper.recipe("vit_tiny", "imagenet")["lr"] == paper.recipe("convnext_femto", "cifar100")["lr"] == 4e-3
    assert paper.recipe("vit_tiny", "svhn")["lr"] == 2e-3
    long, usual = (paper.recipe("convnext_femto", data) for data in ("imagenet_long", "imagenet"))
    assert long == usual | {"epochs": 600, "mixup": 0.3, "cutmix": 0.3}


# ---------------------------------------------------------------------------------------------------------
# Figures


def test_figure_3_takes_directories_of_seeds(make_run, cli, tmp_path, capsys):
    for seed, best in ((0, 73.0), (1, 74.0)):
        make_run("vit_tiny/imagenet/random", seed, best, best)
    selected = make_run("vit_tiny/imagenet/selected", 0, 75.0, 74.5)
    groups = ["random init", selected.parent.with_name("random"), "weight selection", selected]
    assert cli(plot_curves.main, "--output", tmp_path / "curves.png", *groups) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["random", "init", "2", "73.5", "±", "0.7", "73.5", "±", "0.7"]
    assert lines[2].split() == ["weight", "selection", "1", "75.0", "74.5"]
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0.05

    assert cli(plot_curves.main, "--output", tmp_path / "x.png", "a") == "a: no such directory, or a group without runs"
    assert "must end in one of" in cli(plot_curves.main, "--output", tmp_path / "x.mp3", *groups)
    (selected / "log.txt").write_text("{")
    assert f"{selected}/log.txt: not a log.txt" in cli(plot_curves.main, "--output", tmp_path / "x.png", *groups)


def test_figure_4_draws_what_there_is(make_run, cli, tmp_path, capsys):
    out, png = tmp_path / "out", tmp_path / "figure.png"
    assert "no finished runs" in cli(plot_epochs.main, out, "--output", png)
    for seed in (0, 1):
        for epochs, best in ((50, 60.0), (200, 70.0)):
            make_run(f"vit_tiny/cifar100/random_{epochs}", seed, best + seed, epochs=epochs, warmup_epochs=epochs // 6)
        make_run("vit_tiny/cifar100/selected", seed, 80 + seed)
    assert cli(plot_epochs.main, out, "--output", png) is None
    assert capsys.readouterr().out.splitlines() == [
        "random init, 50 epochs: 60.5 (60.0 to 61.0, seeds: 2)",
        "random init, 200 epochs: 70.5 (70.0 to 71.0, seeds: 2)",
        "weight selection, 300 epochs: 80.5 (80.0 to 81.0, seeds: 2)",
        "pretraining reaches weight selection (80.5) after: none of these runs does",
        f"figure: {png}",
    ]
    one_panel = matplotlib.image.imread(png).shape

    make_run("vit_tiny/cifar100/finetuned_20", 0, 78.0)
    make_run("vit_tiny/imagenet/pretrained_20", 0, 60.0, epochs=19)
    make_run("vit_tiny/cifar100/selected_25", 0, 55.0, epochs=1, data_set="image_folder")
    assert cli(plot_epochs.main, out, "--output", png) is None
    lines = capsys.readouterr().out.splitlines()
    assert "pretraining and fine-tuning, 20 epochs: 78.0 (78.0 to 78.0, seeds: 1)" in lines
    assert [line for line in lines if line.startswith("not the paper's recipe")] == [
        "not the paper's recipe: vit_tiny/cifar100/selected_25, seed 0: data_set image_folder (paper: CIFAR100), "
        "epochs 1 (paper: 25)",
        "not the paper's recipe: vit_tiny/imagenet/pretrained_20, seed 0: epochs 19 (paper: 20)",
    ]
    assert matplotlib.image.imread(png).shape[1] == 2 * one_panel[1]


def test_the_claims_of_figure_4_are_computed(make_run, cli, tmp_path, capsys):
    for name, epochs, best in (("random", 300, 72.0), ("selected", 50, 69.0), ("selected", 100, 72.5)):
        length = {"epochs": epochs, "warmup_epochs": (epochs + 3) // 6}
        make_run(f"vit_tiny/cifar100/{name}" + f"_{epochs}" * (epochs < 300), 0, best, **length)
    make_run("vit_tiny/cifar100/selected", 0, 81.0)
    for epochs, best in ((20, 79.0), (60, 81.5), (80, 82.0)):
        make_run(f"vit_tiny/cifar100/finetuned_{epochs}", 0, best)
    assert cli(plot_epochs.main, tmp_path / "out", "--output", tmp_path / "figure.png") is None
    lines = [line for line in capsys.readouterr().out.splitlines() if "reaches" in line]
    assert lines == [
        "weight selection reaches random init (72.0) after: 100 of 300 epochs, 33% (paper: a third)",
        "pretraining reaches weight selection (81.0) after: 60 epochs, 6.12 times the images of selection "
        "(paper: 60, 6.12)",
    ]
