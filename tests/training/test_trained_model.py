"""What a checkpoint says of its model, and what takes it from there: evaluation, first weights, prediction, report."""

import csv
import json
import resource
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import main
import predict as predict_script
from helpers import TEST_IMAGES, read_checkpoint, read_results
from training.options import OPTIONS, parse_args, parse_args_with
from training.trained_model import find_recorded, open_trained
from weight_selection.errors import InputError

CLASSES = ["blue", "green", "red"]
KWARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """The output directory of a run with a moving average."""
    directory = tmp_path_factory.mktemp("described") / "run"
    train(f"--crop_pct 1 --model_ema true --model_ema_decay 0.5 --output_dir {directory}")
    return directory


@pytest.fixture(scope="module")
def report(run):
    """The directory of a report on that run, and the rows of its predictions.csv."""
    directory = run.parent / "report"
    words = ["--eval", "true", "--resume", run, "--output_dir", directory, "--num_workers", "0", "--device", "cpu"]
    main.main(list(map(str, words)))
    with open(directory / "predictions.csv", newline="") as file:
        return directory, list(csv.DictReader(file))


def older(run, directory):
    """A copy of the run's checkpoint as earlier versions wrote it: without a description."""
    content = read_checkpoint(run, "best")
    del content["description"]
    torch.save(content, directory / "older.pth")
    return directory / "older.pth"


def evaluate(capsys, *words):
    """The metrics that an evaluation prints, and all that it prints."""
    main.main(["--eval", "true", "--num_workers", "0", "--device", "cpu", *map(str, words)])
    printed = capsys.readouterr()
    line = next(line for line in printed.out.splitlines() if ": loss" in line)
    return line, printed.out + printed.err


def test_a_checkpoint_says_what_its_model_is(run):
    description = read_checkpoint(run, "best")["description"]
    assert (description["model"], description["model_kwargs"]) == ("vit_tiny", KWARGS)
    assert description["class_names"] == read_results(run)["class_names"] == CLASSES
    assert (description["num_classes"], description["input_size"], description["crop_pct"]) == (3, 16, 1.0)
    assert description["mean"] == pytest.approx([0.485, 0.456, 0.406])
    json.dumps(description)


def test_an_evaluation_takes_its_options_from_the_checkpoint(run, tmp_path, capsys, train):
    train("--crop_pct 1 --eval true --resume", run / "checkpoint-best.pth")
    expected = next(line for line in capsys.readouterr().out.splitlines() if ": loss" in line)
    for named in (["--resume", run], ["--resume", older(run, tmp_path)], ["--finetune", run / "checkpoint-best.pth"]):
        line, printed = evaluate(capsys, *named)
        assert line == expected
        assert "--model_kwargs depth=2 embed_dim=32 num_heads=2 patch_size=4 --input_size 16" in printed
    recorded = {"data_set": "image_folder", "data_path": "a", "eval_data_path": "b", "input_size": 16}
    words = ["--eval", "true", "--resume", str(run)]
    args = parse_args_with([(recorded, "checkpoint")], [*words, "--data_path", "c"])
    assert (args.data_path, args.eval_data_path, args.input_size) == ("c", None, 16), "paths go together"
    args = parse_args_with([(recorded, "checkpoint")], [*words, "--data_set", "digits"])
    assert (args.data_path, args.eval_data_path) == (None, None), "they are of the recorded data set"
    capsys.readouterr()
    _, printed = evaluate(capsys, "--resume", run, "--crop_pct", "0.5")
    assert f"--crop_pct 0.5: {run}/checkpoint-best.pth was trained with --crop_pct 1.0" in printed


def test_an_evaluation_refuses_another_model_or_classes(run, image_folder, tmp_path, cli):
    words = ["--eval", "true", "--resume", run, "--device", "cpu", "--num_workers", "0"]
    message = cli(main.main, *words, "--model", "vit_small")
    assert message.startswith("--model vit_small: ") and "is of --model vit_tiny; leave --model out" in message
    assert "--model_kwargs depth=1: " in cli(main.main, *words, "--model_kwargs", "depth=1")
    renamed = shutil.copytree(image_folder, tmp_path / "renamed")
    for part in ("train", "val"):
        (renamed / part / "blue").rename(renamed / part / "azure")
    assert "of other classes" in cli(main.main, *words, "--data_path", renamed)


def test_training_from_a_checkpoint_takes_what_fits_its_weights(run):
    words = f"--initialize {run}/checkpoint-best.pth --data_set digits".split()
    found = find_recorded(parse_args(words))
    args = parse_args_with(found, words)
    assert (args.model_kwargs, args.input_size, args.data_set) == (KWARGS, 16, "digits")
    assert args.crop_pct is None  # says nothing about the weights
    other = parse_args_with(found, [*words, "--model", "vit_small"])
    assert (other.model, other.model_kwargs, other.input_size) == ("vit_small", {}, 224)


def test_a_teacher_that_is_not_named_is_the_model_of_its_checkpoint(run, tmp_path):
    words = f"--distillation logit --teacher_path {run} --data_set digits".split()
    args = parse_args_with(find_recorded(parse_args(words)), words)
    assert (args.teacher, args.teacher_kwargs, args.model) == ("vit_tiny", KWARGS, OPTIONS["model"].default)
    torch.save({"model": read_checkpoint(run, "best")["model"]}, tmp_path / "bare.pth")
    with pytest.raises(InputError, match="bare.pth: does not say what model its weights are of; give --teacher too"):
        find_recorded(parse_args([*words[:-4], "--teacher_path", str(tmp_path / "bare.pth")]))


@pytest.mark.parametrize("key, value", [("model", 3), ("input_size", "16"), ("model_kwargs", [1])])
def test_a_checkpoint_of_odd_options_is_refused(run, tmp_path, key, value):
    content = read_checkpoint(run, "best")
    content["args"][key] = value
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=f"RUN .*odd.pth: not a checkpoint of main.py: its --{key} is"):
        open_trained(tmp_path / "odd.pth", "RUN")


def test_a_run_without_its_best_checkpoint_is_opened_at_its_newest(run, tmp_path, capsys):
    for epoch in range(2):
        shutil.copy(run / f"checkpoint-{epoch}.pth", tmp_path)
    trained = open_trained(tmp_path, "RUN")
    assert trained.path.name == "checkpoint-1.pth" and trained.epoch == 1 and trained.class_names == CLASSES
    assert f"{tmp_path}: has not finished; takes checkpoint-1.pth, of epoch 1" in capsys.readouterr().err
    assert trained.metrics["acc1"] == read_results(run)["last"]["acc1"]
    average = open_trained(tmp_path, "RUN", ema=True)
    assert not torch.equal(average.model.pos_embed, trained.model.pos_embed)
    torch.testing.assert_close(average.model.state_dict(), read_checkpoint(run, "1")["model_ema"])


def test_older_checkpoints_are_opened_with_numbers_for_classes(run, tmp_path):
    assert open_trained(older(run, tmp_path), "RUN").class_names == ["0", "1", "2"]


def test_a_report_agrees_with_the_evaluation(run, report, cli):
    directory, rows = report
    content = json.loads((directory / "report.json").read_text())
    assert content["acc1"] == read_results(run)["best"]["acc1"]
    assert list(content["classes"]) == CLASSES
    right = sum(one["acc1"] * one["images"] for one in content["classes"].values()) / TEST_IMAGES
    assert right == pytest.approx(content["acc1"])
    assert len(rows) == content["images"] == TEST_IMAGES
    assert all(f"/val/{row['class']}/" in row["image"] for row in rows)
    assert 100 * np.mean([row["class"] == row["class_1"] for row in rows]) == pytest.approx(content["acc1"])
    assert sum(one["images"] for one in content["confusions"]) == sum(row["class"] != row["class_1"] for row in rows)
    for name in ("confusion.png", "worst.png"):
        Image.open(directory / name).verify()
    words = ["--eval", "true", "--resume", run, "--output_dir", directory, "--num_workers", "0"]
    assert "holds a report (report.json)" in cli(main.main, *words)


def test_a_report_that_a_full_disk_ends_leaves_no_part_of_itself(run, tmp_path, cli):
    words = ["--eval", "true", "--resume", run, "--output_dir", tmp_path, "--num_workers", "0", "--device", "cpu"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # as much as tables need, and figures do not fit in
    try:
        message = cli(main.main, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"cannot write {tmp_path}/confusion.png: ") and not list(tmp_path.iterdir())


def test_predictions_are_those_of_the_evaluation(run, report, capsys, image_folder):
    expected = {row["image"]: (row["class_1"], row["probability_1"]) for row in report[1]}
    words = [run, image_folder / "val", "--device", "cpu", "--num_workers", "0", "--batch_size", "5", "--format", "csv"]
    predict_script.main([str(word) for word in words])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {row["image"]: (row["class_1"], row["probability_1"]) for row in rows} == expected


def test_damaged_images_are_named_and_left_out(run, tmp_path, capsys, image_folder, cli):
    good = shutil.copy(next((image_folder / "val" / "red").iterdir()), tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "list.txt").write_text("bad.png\n\ngood.png\n")
    words = [run, tmp_path / "list.txt", "--device", "cpu", "--num_workers", "0", "--top_k", "2", "--format", "json"]
    assert cli(predict_script.main, *words, "--output", tmp_path / "out.json") is None
    printed = capsys.readouterr()
    assert "bad.png cannot be read" in printed.err and "1 of 2 images skipped" in printed.err and not printed.out
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["image"] == str(good) and len(row["predictions"]) == 2
    assert row["predictions"][0]["class"] == CLASSES[row["predictions"][0]["label"]]
    assert "exists; add --overwrite" in cli(predict_script.main, *words, "--output", tmp_path / "out.json")
    assert cli(predict_script.main, run, tmp_path / "bad.png", "--num_workers", "0") == "none of the images can be read"


def test_what_cannot_be_predicted_is_refused(run, tmp_path, cli):
    assert "no such file" in cli(predict_script.main, run, tmp_path / "none")
    assert "no images in it" in cli(predict_script.main, run, tmp_path)
    image = next(run.parent.parent.rglob("val/red/*.png"))
    assert "holds no checkpoint of main.py" in cli(predict_script.main, tmp_path, image)
    assert "--top_k 0: " in cli(predict_script.main, run, image, "--top_k", "0")
    (tmp_path / "list.txt").write_text("none.png\n")
    assert "lists" in cli(predict_script.main, run, tmp_path / "list.txt")
    (tmp_path / "notes.txt").write_text("a line of a text that is no list " * 20)
    assert "notes.txt: is no list of paths (" in cli(predict_script.main, run, tmp_path / "notes.txt")
    (tmp_path / "notes.pth").write_text("no checkpoint")
    message = cli(main.main, "--eval", "true", "--resume", tmp_path / "notes.pth")
    assert message.startswith(f"--resume {tmp_path}/notes.pth: not a checkpoint of main.py")
