"""The command line as people type it: dashes, upper and lower case, options without a value, slips; and --help."""

import re

import pytest

from helpers import read_log, read_results
from training.options import OPTIONS, complete_warmup, get_args_parser, parse_args
from weight_selection.cli import get_args_parser as selection_parser
from weight_selection.errors import InputError

# ---------------------------------------------------------------------------------------------------------
# Spelling


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--batch-size 8 --use-amp true --opt-betas 0.9 0.99", "--batch_size 8 --use_amp true --opt_betas 0.9 0.99"),
        ("--batch-size=8 --model-kwargs embed_dim=96", "--batch_size 8 --model_kwargs embed_dim=96"),
        ("--data_set cifar100", "--data_set CIFAR100"),
        ("--data-set imnet --init Kaiming", "--data_set IMNET --init kaiming"),
        ("--use_amp --epochs 3", "--use_amp true --epochs 3"),
        ("--model_ema --use_amp false --deterministic", "--model_ema true --use_amp false --deterministic true"),
        ("--dist_eval no --pin_mem", "--dist_eval false --pin_mem true"),
    ],
)
def test_options_mean_the_same_however_they_are_typed(typed, meant):
    assert parse_args(typed.split()) == parse_args(meant.split())


def test_a_recipe_names_data_sets_in_any_case(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data_set: Cifar10\n")
    assert parse_args(["--config", str(tmp_path / "recipe.yaml")]).data_set == "CIFAR10"


def test_the_selection_takes_dashes_and_any_case_too():
    typed = "--pretrained-model a --layer-selection Last_N --element-selection L1 --exclude MLP norm --dry-run"
    meant = "--pretrained_model a --layer_selection last_n --element_selection l1 --exclude mlp norm --dry_run"
    parse = selection_parser().parse_args
    assert parse(typed.split()) == parse(meant.split())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--batchsize 8", "--batchsize: no such option; did you mean --batch_size?"),
        ("--epoch=8", "--epoch: no such option; did you mean --epochs?"),
        ("--learning-rate-of-everything 1", "--learning-rate-of-everything: no such option; see --help"),
        ("eval", "eval: belongs to no option; did you mean --eval?; see --help"),
        ("--data_set cifar-100", "--data_set: cifar-100 is none of CIFAR10, "),
        ("--data_set cifar-100", "; did you mean CIFAR100?"),
        ("--init kaimin", "--init: kaimin is none of timm, xavier, kaiming, mimetic; did you mean kaiming?"),
        ("--use_amp maybe", "--use_amp: 'maybe' is neither true nor false"),
    ],
)
def test_slips_are_answered_with_what_was_meant(typed, message):
    with pytest.raises(InputError) as caught:
        parse_args(typed.split())
    assert message in str(caught.value)


def test_slips_in_a_selection_and_in_a_recipe(tmp_path):
    for typed, meant in (("--outputdir x", "--output_dir"), ("--element_selection unifrom", "uniform")):
        with pytest.raises(InputError, match=rf"; did you mean {meant}\?"):
            selection_parser().parse_args(typed.split())
    (tmp_path / "recipe.yaml").write_text("epoch: 8\n")
    with pytest.raises(InputError, match=r"epoch is not an option of main.py; did you mean epochs\?"):
        parse_args(["--config", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("parser", [get_args_parser, selection_parser])
def test_help_says_each_default_once_and_no_empty_one(parser):
    text = " ".join(parser().format_help().split())
    assert not re.search(r"\(default: (None|\{\}|\[\]|False|True|)\)", text)
    assert not re.search(r"\(default[^)]*\) \(default", text)


def test_help_says_defaults_as_they_are_typed():
    text = " ".join(get_args_parser().format_help().split())
    for name, words in {"use_amp": "false", "scale": "0.08 1.0", "epochs": "300", "warmup_steps": "-1"}.items():
        assert f"{OPTIONS[name].help} (default: {words})" in text


# ---------------------------------------------------------------------------------------------------------
# Warm-up


@pytest.mark.parametrize(("epochs", "warmup"), [(300, 50), (600, 50), (60, 10), (20, 3), (5, 0)])
def test_warm_up_is_a_sixth_of_the_run_and_at_most_the_papers(epochs, warmup):
    assert complete_warmup(parse_args(["--epochs", str(epochs)])).warmup_epochs == warmup
    assert complete_warmup(parse_args(["--epochs", str(epochs), "--warmup_epochs", "2"])).warmup_epochs == 2


def test_warm_up_that_was_not_given_is_said_and_recorded(train, tmp_path, capsys):
    train("--warmup_steps -1 --epochs 1 --output_dir", tmp_path)
    assert "warm-up: 0 of 1 epochs; --warmup_epochs sets another number" in capsys.readouterr().out.splitlines()
    assert read_results(tmp_path)["args"]["warmup_epochs"] == 0


def test_a_run_goes_on_with_the_warm_up_that_it_was_started_with(train, interrupted, tmp_path, capsys):
    """As a run of version 0.1, which took 50 epochs when none were given, goes on by the same command."""
    train("--warmup_steps -1 --warmup_epochs 1 --output_dir", tmp_path / "whole")
    interrupted(1, "--warmup_steps -1 --warmup_epochs 1 --output_dir", tmp_path / "a")
    capsys.readouterr()
    with pytest.raises(InputError, match="args.json is of a run with --warmup_epochs 1, not 0"):
        train("--warmup_steps -1 --warmup_epochs 0 --output_dir", tmp_path / "a")
    train("--warmup_steps -1 --output_dir", tmp_path / "b", "--resume", tmp_path / "a" / "checkpoint-0.pth")
    train("--warmup_steps -1 --output_dir", tmp_path / "a")
    assert capsys.readouterr().out.count("warm-up: 1 of 2 epochs") == 2
    assert read_log(tmp_path / "a") == read_log(tmp_path / "whole")
    assert read_log(tmp_path / "b") == read_log(tmp_path / "whole")[1:]
    assert read_results(tmp_path / "b")["args"]["warmup_epochs"] == 1
