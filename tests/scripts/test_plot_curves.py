"""Curves of runs that are named by their directories, and their gap to a baseline."""

import json

import pytest

import plot_curves


@pytest.fixture
def runs(tmp_path):
    """Directories of finished runs: {name: directory that holds the run of seed 0}."""
    curves = {"random": [10.0, 20.0], "selected": [30.0, 50.0, 60.0], "other": [5.0, 20.0]}
    for name, accuracies in curves.items():
        directory = tmp_path / name / "0"
        directory.mkdir(parents=True)
        rows = [{"epoch": n, "train_loss": n, "test_loss": 2, "test_acc1": v} for n, v in enumerate(accuracies)]
        (directory / "log.txt").write_text("\n".join(map(json.dumps, rows)))
        last = {"acc1": accuracies[-1]}
        results = {"best": last, "last": last, "seed": 0, "epochs": len(rows), "train_images": 8, "data_set": "digits"}
        (directory / "results.json").write_text(json.dumps(results | {"args": {}}))
    return {name: tmp_path / name for name in curves}


def test_runs_are_drawn_and_compared_with_a_baseline(runs, cli, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(plot_curves.style, "save", lambda figure, path: figures.append(figure))
    words = ["--baseline", runs["random"], runs["selected"], runs["other"]]
    assert cli(plot_curves.main, "--output", "x.png", *words) is None
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:4]] == [
        ["random", "1", "20.0", "20.0"],
        ["selected", "1", "60.0", "60.0", "+40.0", "+40.0"],
        ["other", "1", "20.0", "20.0", "+0.0", "+0.0"],
    ]
    accuracy, loss, gap = ([line.get_xydata().tolist() for line in axes.lines] for axes in figures[0].axes)
    assert accuracy[1] == [[1, 30], [2, 50], [3, 60]]
    assert loss[:2] == [[[1, 2], [2, 2]], [[1, 2], [2, 2], [3, 2]]], "on the test images"
    assert loss[3] == [[1, 0], [2, 1]], "in training"
    assert gap[:2] == [[[1, 20], [2, 30]], [[1, -5], [2, 0]]], "where both were evaluated"


def test_runs_without_a_name_are_called_by_their_directories(runs):
    words = [str(runs["random"] / "0"), str(runs["selected"] / "0"), "rest", str(runs["other"])]
    groups = plot_curves.read_groups(words)
    assert [group.name for group in groups] == ["random/0", "selected/0", "rest"]
    assert [group.directories for group in groups] == [[runs[name] / "0"] for name in runs]


def test_baseline_among_the_runs_is_drawn_once(runs, cli, tmp_path, capsys):
    words = ["--baseline", runs["random"], "random init", runs["random"], "weight selection", runs["selected"]]
    assert cli(plot_curves.main, "--output", tmp_path / "x.png", *words) is None
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("gap to random init: best, last")
    assert [line.split()[0] for line in lines] == ["random", "weight", "curves:"]


def test_baseline_that_cannot_be_compared_with(runs, cli):
    words = ["--output", "x.png", "--baseline"]
    assert cli(plot_curves.main, *words, "nothing", runs["random"]) == "--baseline nothing: no such directory"
    (runs["other"] / "0" / "log.txt").write_text('{"epoch": 7, "test_loss": 1, "train_loss": 1, "test_acc1": 1}')
    assert "evaluated after no epoch after which random was" in cli(
        plot_curves.main, *words, runs["random"], runs["other"]
    )
