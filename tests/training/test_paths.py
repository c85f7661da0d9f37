"""Paths as people give them: a directory for a file, one that can be none; and what a refused command leaves behind."""

import pytest

import main
from helpers import read_results
from training.options import check_weights, parse_args
from training.setup import complete_options
from weight_selection.cli import main as select_main
from weight_selection.errors import InputError


@pytest.fixture
def refusal(tiny_run):
    """Run main.py with further options; the message it refuses them with."""

    def run(*options):
        with pytest.raises(InputError) as caught:
            main.main([*tiny_run, *map(str, options)])
        return str(caught.value)

    return run


def completed(*options):
    args = parse_args([*map(str, options), "--device", "cpu"])
    check_weights(args)
    return complete_options(args, 0)


# ---------------------------------------------------------------------------------------------------------
# A directory where a file is expected


def test_directory_of_a_run_is_its_best_checkpoint_and_images_may_lie_a_level_higher(train, image_folder, tmp_path):
    train("--epochs 1 --output_dir", tmp_path / "first")
    below = ["--data_path", image_folder / "train", "--output_dir", tmp_path / "b"]
    train("--epochs 1 --lr 0 --min_lr 0 --finetune", tmp_path / "first", *below)
    best = tmp_path / "first" / "checkpoint-best.pth"
    assert read_results(tmp_path / "b")["args"]["finetune"] == str(best)


@pytest.mark.parametrize("option", ["--finetune", "--teacher_path"])
def test_weights_in_a_directory_are_found(tmp_path, option):
    more = ["--distillation", "logit", "--teacher", "vit_tiny"] if option == "--teacher_path" else []
    message = f"{option} {tmp_path}: no weights in it; there is no such file as model.safetensors, "
    with pytest.raises(InputError, match=message):
        completed(*more, option, tmp_path)
    for name in ("checkpoint-best.pth", "model.safetensors"):  # the second is looked for first
        (tmp_path / name).touch()
        assert getattr(completed(*more, option, tmp_path), option[2:]) == str(tmp_path / name)


def test_resume_takes_the_newest_checkpoint_of_a_run_to_train_and_the_best_to_evaluate(tmp_path):
    for name in ("9", "10", "best"):
        (tmp_path / f"checkpoint-{name}.pth").touch()
    assert completed("--resume", tmp_path).resume == str(tmp_path / "checkpoint-10.pth")
    assert completed("--eval", "true", "--resume", tmp_path).resume == str(tmp_path / "checkpoint-best.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="^--resume .*/empty: holds no checkpoint of main.py; "):
        completed("--resume", tmp_path / "empty")


# ---------------------------------------------------------------------------------------------------------
# Directories that can be none, and that a refused command made


@pytest.mark.parametrize("option", ["--output_dir", "--log_dir"])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "is empty; give a directory, or leave the option out"),
        ("x.txt", "cannot write there, as it is a file; name another directory"),
        ("y.txt", "has the name of a .txt file; name a directory"),
        ("/dev/full", "cannot write there, as it is a device; name another directory"),
    ],
)
def test_directories_that_can_be_none_are_refused_at_once(option, path, reason, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(InputError) as caught:
        check_weights(parse_args([option, path]))
    assert str(caught.value) == " ".join(filter(None, (option, path))) + f": {reason}"
    if option == "--output_dir":
        command = ["--pretrained_model", "vit_tiny", "--width", "1/3", "--output_dir", path]
        assert cli(select_main, *command) == str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("option", ["--initialize", "--finetune", "--resume", "--data_path", "--model"])
def test_option_that_a_variable_left_empty_is_refused(option):
    with pytest.raises(InputError, match=f"^{option}: is empty; give a"):
        parse_args([option, ""])


@pytest.mark.parametrize("mistake", ["--opt adamn", "--warmup_steps 7", "--initialize none"])
def test_refused_command_leaves_no_directory_and_the_corrected_one_is_not_refused(mistake, refusal, tmp_path):
    (tmp_path / "none").mkdir()
    new, mine = tmp_path / "a" / "b", tmp_path / "mine"
    mine.mkdir()
    mistake = mistake.replace("none", str(tmp_path / "none")).split()
    for directory in (new, mine):
        assert refusal(*mistake, "--output_dir", directory, "--log_dir", tmp_path / "log" / "1")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "none"]


def test_refused_selection_leaves_no_directory(tmp_path, cli):
    (tmp_path / "teacher.pth").write_text("none")
    command = ["--pretrained_model", "vit_tiny", "--width", "1/3", "--teacher_kwargs", "depth=1", "--pretrained_path"]
    message = cli(select_main, *command, tmp_path / "teacher.pth", "--output_dir", tmp_path / "a" / "b")
    assert message.startswith(f"--pretrained_path {tmp_path}/teacher.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.pth"]
