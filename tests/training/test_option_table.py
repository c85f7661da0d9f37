"""The table of main.py's options: its rows are complete, and what is derived from it is as it was meant."""

import copy
import json
import pickle
from pathlib import Path

import pytest

from helpers import read_log, read_results
from training.options import (
    CANNOT_CHANGE_RESULT,
    MAY_CHANGE_ON_RESUME,
    NOT_TAKEN,
    OPTIONS,
    TABLE,
    check_options,
    default_options,
    get_args_parser,
    parse_args,
)
from training.output_dir import check_same_run
from weight_selection.errors import InputError


def test_each_option_of_the_command_line_is_one_row():
    names = [option.name for rows in TABLE.values() for option in rows]
    assert len(names) == len(set(names))
    assert {action.dest for action in get_args_parser()._actions} == {*names, "help", *NOT_TAKEN}
    assert vars(default_options()).keys() == set(names)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_row_is_complete(option):
    assert option.help
    if option.default is not None:
        values = option.default if option.nargs else [option.default]
        assert all(isinstance(value, (int, float) if option.type is float else option.type) for value in values)
        assert option.choices is None or option.default in option.choices
    assert not option.set_by or option.type is dict


def test_defaults_are_accepted_and_are_those_of_the_parser():
    check_options(default_options(), set(OPTIONS) & {"lr", "epochs"})
    assert default_options() == parse_args([])
    assert vars(get_args_parser().parse_args([])) == vars(default_options())


# For each need, a command that does not meet it, what its error says, and the options that have this need.
# fmt: off
UNMET = [
    ("", "--model_ema false", "model_ema_decay model_ema_force_cpu model_ema_eval"),
    ("", "--use_amp false", "amp_dtype"),
    ("--eval true --finetune x", "--eval true",
     "compile classifier_init log_dir skip_bad_images start_epoch save_ckpt save_ckpt_freq save_ckpt_steps "
     "save_ckpt_num"),
    ("--weight_decay 0", "--weight_decay 0", "weight_decay_end"),
    ("--mixup 0 --cutmix 0", "--mixup 0 --cutmix 0", "mixup_prob mixup_switch_prob mixup_mode"),
    ("--cutmix_minmax 0.2 0.8", "--cutmix_minmax", "cutmix"),
    ("", "--aa rand-m9-mstd0.5-inc1", "color_jitter"),
    ("--reprob 0", "--reprob 0", "remode recount"),
    ("", "no --finetune or --initialize", "model_key"),
    ("--resume x", "--finetune or --resume", "init"),
    ("", "--distillation none", "distillation_alpha teacher teacher_path teacher_kwargs"),
    ("--linear_probe true", "--linear_probe true", "head_init_scale layer_decay classifier_init"),
    ("--head_init_scale 0.5", "--head_init_scale 0.5", "classifier_init"),
    ("--total_batch_size 64", "--total_batch_size, which sets it", "update_freq"),
    ("--warmup_steps 5", "--warmup_steps", "warmup_epochs"),
    ("--disable_eval true", "--disable_eval true", "eval_interval"),
    ("", "no --output_dir", "overwrite save_ckpt save_ckpt_freq save_ckpt_steps save_ckpt_num wandb_ckpt"),
    ("--output_dir x --save_ckpt false", "--save_ckpt false",
     "save_ckpt_freq save_ckpt_steps save_ckpt_num wandb_ckpt"),
    ("", "--enable_wandb false", "project"),
    ("--output_dir x", "--enable_wandb false", "wandb_ckpt"),
    ("--data_set digits", "--data_set digits", "data_path eval_data_path"),
    ("--data_set CIFAR10", "--data_set CIFAR10", "eval_data_path"),
]
# fmt: on


@pytest.mark.parametrize(("command", "why", "names"), UNMET)
def test_option_without_what_it_needs_is_refused(command, why, names):
    for name in names.split():
        option = OPTIONS[name]
        others = [choice for choice in option.choices or () if choice != option.default]
        words = {bool: str(not option.default).lower(), dict: "a=1", str: "x", float: "0.25", int: "2"}
        words = [others[0] if others else words[option.type]]
        with pytest.raises(InputError) as caught:
            parse_args([*command.split(), f"--{name}", *words])
        value = {bool: not option.default, dict: "{'a': 1}"}.get(option.type)
        assert str(caught.value).startswith(f"--{name} {'' if value is None else value}")
        assert str(caught.value).endswith(f": has no effect with {why}; leave it out")


@pytest.mark.parametrize(("command", "why", "names"), UNMET)
def test_the_default_value_of_an_option_is_never_refused(command, why, names):
    for name in names.split():
        default = OPTIONS[name].default
        if default not in (None, {}):
            parse_args([*command.split(), f"--{name}", str(default)])


def test_options_of_the_release_that_are_not_taken_say_why():
    for words, reason in (("--resplit true", "not split"), ("--model_prefix encoder.", "matched without one")):
        with pytest.raises(InputError, match=f"^{words}: .*{reason}.*; leave it out$"):
            parse_args(words.split())


def test_every_need_is_tried():
    tried = {(name, why.split()[0]) for _, why, names in UNMET for name in names.split()}
    needs = {(name, need.otherwise.split()[0]) for name, option in OPTIONS.items() for need in option.needs}
    assert tried == needs


# ---------------------------------------------------------------------------------------------------------
# Options that a run may change, and options that cannot change its result

# fmt: off
FREE_ON_RESUME = {
    "config", "data_path", "eval_data_path", "num_workers", "pin_mem", "output_dir", "log_dir", "device", "eval",
    "disable_eval", "eval_interval", "dist_eval", "resume", "auto_resume", "overwrite", "save_ckpt",
    "save_ckpt_freq", "save_ckpt_steps", "save_ckpt_num", "start_epoch", "enable_wandb", "project", "wandb_ckpt",
    "world_size", "local_rank", "dist_on_itp", "dist_url", "batch_size", "update_freq", "amp_dtype",
    "model_ema_force_cpu", "skip_bad_images", "timeout", "deterministic",
    "augment_device", "cache_images", "eval_batch_size", "compile", "channels_last",
}
# fmt: on


def test_options_that_may_change_on_resume():
    assert MAY_CHANGE_ON_RESUME == FREE_ON_RESUME


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_goes_on_only_with_options_that_may_change(name):
    args = default_options()
    other = args.plain() | {name: "another"}
    if name in MAY_CHANGE_ON_RESUME:
        check_same_run(args, other, "args.json")
    else:
        with pytest.raises(InputError, match=f"of a run with --{name} another, not "):
            check_same_run(args, other, "args.json")


def test_what_may_change_on_resume_may_still_change_the_result():
    """How a batch is shared out decides what mixup draws; devices and kernels round differently."""
    machine = {"batch_size", "update_freq", "amp_dtype", "device", "compile", "channels_last", "augment_device"}
    assert machine <= MAY_CHANGE_ON_RESUME
    assert not machine & CANNOT_CHANGE_RESULT
    assert not {"eval_interval", "disable_eval", "start_epoch", "seed", "lr", "model"} & CANNOT_CHANGE_RESULT
    assert {"nb_classes"} == CANNOT_CHANGE_RESULT - MAY_CHANGE_ON_RESUME, "it is only compared with the data set's"


def test_options_that_cannot_change_the_result_do_not(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("lr: 0.5\n")  # the command line's own goes over it
    changed = "--num_workers 1 --cache_images true --pin_mem false --nb_classes 3 --log_dir board --save_ckpt_freq 2 "
    changed += "--save_ckpt_steps 2 --save_ckpt_num 1 --auto_resume false --timeout 600 --local_rank 0 "
    changed += "--dist_url tcp://localhost:1 --config recipe.yaml"
    assert set(changed.replace("--", "").split()[::2]) <= CANNOT_CHANGE_RESULT
    train("--output_dir plain")
    train(changed, "--output_dir changed")
    train("--save_ckpt false --output_dir unsaved")
    for name in ("changed", "unsaved"):
        assert read_log(Path(name)) == read_log(Path("plain"))
        ours, theirs = read_results(Path(name)), read_results(Path("plain"))
        differing = {option for option in OPTIONS if ours["args"][option] != theirs["args"][option]}
        assert differing <= CANNOT_CHANGE_RESULT
        assert (ours["best"], ours["last"]) == (theirs["best"], theirs["last"])


# ---------------------------------------------------------------------------------------------------------
# Options do not change


def test_options_are_frozen():
    args = default_options()
    with pytest.raises(AttributeError, match=r"options.replace\(lr=...\)"):
        args.lr = 1.0
    with pytest.raises(AttributeError):
        del args.lr
    assert args.lr == OPTIONS["lr"].default


def test_replace_makes_a_copy_and_takes_no_unknown_name():
    args = default_options()
    changed = args.replace(lr=1.0, epochs=2)
    assert (changed.lr, changed.epochs, args.epochs) == (1.0, 2, 300)
    assert changed.replace(lr=args.lr, epochs=300) == args
    with pytest.raises(TypeError, match="no such option: learning_rate"):
        args.replace(learning_rate=1.0)


def test_a_parsed_default_is_not_the_table_s_own_object():
    parse_args([]).model_kwargs["depth"] = 3
    assert parse_args([]).model_kwargs == OPTIONS["model_kwargs"].default == {}


def test_options_can_be_copied_sent_to_another_process_and_written_as_json():
    args = parse_args(["--model_kwargs", "depth=3", "dims=(1,2)"])
    assert copy.deepcopy(args) == pickle.loads(pickle.dumps(args)) == args
    assert json.loads(json.dumps(args.plain())) == args.plain()
    assert args.plain()["model_kwargs"] == {"depth": 3, "dims": [1, 2]}
    assert list(args.plain()) == sorted(OPTIONS)
