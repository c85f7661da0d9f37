"""What main.py refuses, and how it says so: one line that names option and value, before any training."""

import json
import re
import shutil
import sys

import pytest
import torch

import main
import training.run
from helpers import read_log
from training.options import complete_warmup, parse_args, share_batch
from weight_selection.errors import InputError
from weight_selection.sources.timm_models import create_model


@pytest.fixture
def refused(tiny_run, monkeypatch):
    """Run main.py with further options; the message it refuses them with. Training would fail the test."""

    def no_training(*args):
        raise AssertionError("trained instead of refusing the options")

    def run(options, *more):
        monkeypatch.setattr(training.run, "train_one_epoch", no_training)
        with pytest.raises(InputError) as caught:
            main.main([*tiny_run, *options.split(), *map(str, more)])
        return " ".join(str(caught.value).split())  # as run_program prints it

    return run


# ---------------------------------------------------------------------------------------------------------
# Values


def test_unknown_model_is_answered_with_near_matches(refused):
    message = refused("--model vit_tinny")
    assert message.startswith("--model vit_tinny: no such model; did you mean")
    assert "vit_tiny" in message.split("mean")[1]


@pytest.mark.parametrize(
    "option",
    [
        "--batch_size 0",
        "--total_batch_size 0",
        "--epochs 0",
        "--save_ckpt_num 0",
        "--lr -1",
        "--lr nan",
        "--seed -1",
        "--drop_path 1.5",
        "--smoothing 2",
        "--layer_decay 0",
        "--clip_grad 0",
        "--crop_pct 0",
        "--num_workers -1",
        "--start_epoch 2",
        "--world_size 4",
        "--opt adamn",
        "--opt_betas 0.9",
        "--nb_classes 10",
        "--aa strong",
        "--lr inf",
        "--mixup inf",
        "--weight_decay_end -1",
        "--recount 0",
        "--head_init_scale nan",
        "--layer_scale_init_value nan",
    ],
)
def test_value_that_cannot_be_is_refused_by_name(refused, option):
    name, value = option.split()
    message = refused(option)
    assert name in message
    assert value in message


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("--scale 1.0 0.1", "the smaller first"),
        ("--scale -1.0 0.5", "above 0"),
        ("--scale 0.5 2.0", "up to 1"),
        ("--scale nan nan", "above 0"),
        ("--cutmix_minmax 0.8 0.2", "the smaller first"),
        ("--cutmix_minmax 0.0 3.0", "from 0 to 1"),
        ("--cutmix_minmax 0.5 0.51", "not a pixel apart at --input_size 16"),
    ],
)
def test_pair_that_cannot_be_is_refused_by_name(refused, option, why):
    assert refused(option).startswith(f"{option}: ") and why in refused(option)


@pytest.mark.parametrize(
    "option", ["--epochs three", "--use_amp maybe", "--data_set cifar", "--mixup_mode some", "--model_kwargs depth"]
)
def test_word_of_the_wrong_kind_is_refused_by_name(refused, option):
    message = refused(option)
    assert all(word in message for word in option.split())


@pytest.mark.parametrize("options", ["--batchsize 16", "--batch 16"])
def test_unknown_option_and_abbreviation_are_refused(refused, options):
    assert options.split()[0] in refused(options)


def test_model_kwargs_that_timm_does_not_take_are_refused(refused):
    assert refused("--model_kwargs embed_dimension=32").startswith("--model vit_tiny: timm cannot build it")


def test_model_that_gives_no_vector_for_an_image_is_refused(refused):
    words = "--model_kwargs embed_dim=32 depth=1 num_heads=2 patch_size=4 global_pool="
    assert refused(words) == "--model vit_tiny: does not give one vector for an image; change its arguments"


@pytest.mark.parametrize("options", ["--linear_probe true", "--model test_resnet --model_kwargs in_chans=3"])
def test_batch_normalisation_of_single_images_is_refused(refused, options):
    message = refused(f"{options} --batch_size 1 --total_batch_size 16 --mixup 0 --cutmix 0")
    assert message.startswith("--batch_size 1: ") and "has a batch normalisation" in message


def test_input_size_that_leaves_nothing_for_the_last_stage_is_refused(refused):
    assert "--input_size 16" in refused("--model convnext_femto --model_kwargs dims=(8,8,8,8) --input_size 16")


def test_number_of_classes_is_not_a_model_option(refused):
    assert "num_classes" in refused("--model_kwargs num_classes=2")


# ---------------------------------------------------------------------------------------------------------
# Values that do not go together


def test_warm_up_longer_than_training(refused):
    message = refused("--warmup_steps -1 --warmup_epochs 3 --epochs 2")
    assert message.startswith("--warmup_epochs 3: longer than --epochs 2")


def test_warm_up_steps_longer_than_training(refused):
    assert re.search("--warmup_steps.*7 warm-up steps.*only 6", refused("--warmup_steps 7"))


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--batch_size 64", "--batch_size 64"),
        ("--update_freq 4", "--update_freq"),
        ("--total_batch_size 64", "--total_batch_size"),
    ],
)
def test_fewer_images_than_one_batch(refused, option, named):
    message = refused(option)
    assert named in message
    assert "48 training images are fewer than one batch of 64" in message


def test_mixup_needs_pairs(refused):
    assert refused("--batch_size 15").startswith("--batch_size 15: mixup mixes pairs")


@pytest.mark.parametrize(
    ("options", "processes", "shares"),
    [
        ("--total_batch_size 512 --batch_size 64", 8, (64, 1)),
        ("--total_batch_size 512 --batch_size 64", 1, (64, 8)),
        ("--total_batch_size 48 --batch_size 32", 2, (24, 1)),
        ("--total_batch_size 100 --batch_size 32", 2, (10, 5)),  # 25 divides 50, too, but mixup needs pairs
        ("--total_batch_size 100 --batch_size 32 --mixup 0 --cutmix 0", 2, (25, 2)),
        ("--total_batch_size 14", 7, (2, 1)),
    ],
)
def test_total_batch_is_shared_out_whatever_the_number_of_processes(options, processes, shares):
    given = parse_args(options.split())
    args = share_batch(given, processes)
    assert (args.batch_size, args.update_freq) == shares
    assert args.total_batch_size == given.total_batch_size


def test_total_batch_follows_from_micro_batch_and_accumulation():
    args = share_batch(parse_args(["--batch_size", "4", "--update_freq", "3"]), 5)
    assert args.total_batch_size == 60


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--total_batch_size 33", "not a multiple of 2 processes"),
        ("--total_batch_size 6", "mixup needs an even number"),  # three images in each of two processes
        ("--total_batch_size 8 --batch_size 1", "mixup needs an even number"),
    ],
)
def test_total_batch_that_cannot_be_shared_out(options, reason):
    with pytest.raises(InputError, match=f"{' '.join(options.split()[:2])}: .*{reason}"):
        share_batch(parse_args(options.split()), 2)


@pytest.mark.parametrize(
    "option",
    [
        "--amp_dtype bfloat16",
        "--model_ema_decay 0.99",
        "--model_ema_eval true",
        "--color_jitter 0.1",
        "--model_key model",
        "--save_ckpt_num 2",
        "--project x",
        "--mixup 0 --cutmix 0 --mixup_prob 0.5",
        "--cutmix_minmax 0.2 0.8 --cutmix 0.5",
        "--reprob 0 --remode const",
        "--total_batch_size 16 --update_freq 2",
        "--warmup_epochs 1",
        "--disable_eval true --eval_interval 2",
        "--weight_decay 0 --weight_decay_end 0.1",
        "--layer_scale_init_value 0.1",
        "--data_set digits",  # leaves --data_path without effect
    ],
)
def test_option_without_effect_is_refused(refused, option):
    name = "--data_path" if "digits" in option else "--" + option.split("--")[-1].split()[0]
    assert name in refused(option)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--initialize a.pth --finetune b.pth", "--initialize a.pth"),
        ("--eval true", "--eval true"),
        ("--eval true --resume a.pth --initialize b.pth", "--initialize b.pth: give it or --resume"),
        ("--overwrite true --output_dir x --resume y.pth", "--overwrite true"),
        ("--lr 1e-3 --min_lr 2e-3", "--min_lr 0.002: above --lr 0.001"),
    ],
)
def test_options_that_contradict_each_other(refused, options, named):
    assert refused(options).startswith(named)


# ---------------------------------------------------------------------------------------------------------
# --config


def write_config(directory, text):
    path = directory / "recipe.yaml"
    path.write_text(text)
    return path


def test_command_line_wins_over_config_and_config_over_defaults(tmp_path):
    path = write_config(
        tmp_path, "lr: 1.0e-3\nepochs: 7\nwarmup_steps: -1\nmodel_kwargs: {depth: 3}\nuse_amp: true\nscale: [0.5, 1]\n"
    )
    args = parse_args(["--epochs", "60", "--config", str(path)])
    assert (args.epochs, args.lr, complete_warmup(args).warmup_epochs) == (60, 1e-3, 10)
    assert (args.model_kwargs, args.use_amp, args.scale) == ({"depth": 3}, True, [0.5, 1.0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("epoch: 3\n", "epoch is not an option"),
        ("config: other.yaml\n", "config is not an option"),
        ("- epochs\n", "must be NAME: VALUE lines"),
        ("epochs: [3\n", "not YAML"),
        ("lr: 1e-3\nepochs: 3\nlr: 2e-3\n", "lr stands twice"),
        ("sections:\n  a: {lr: 1}\n  b: {lr: 2}\n  a: {lr: 3}\n", "a stands twice"),
    ],
)
def test_config_that_is_none(refused, tmp_path, text, reason):
    path = write_config(tmp_path, text)
    message = refused("--config", path)
    assert message.startswith(f"--config {path}: ")
    assert reason in message


def test_config_goes_over_its_base_and_that_over_its_own(tmp_path):
    write_config(tmp_path, "lr: 1.0\nepochs: 7\nseed: 1\nmodel_kwargs: {depth: 3}\n").rename(tmp_path / "root.yaml")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "middle.yaml").write_text("base: ../root.yaml\nepochs: 9\nlr: 2.0\n")
    (tmp_path / "other.yaml").write_text("epochs: 8\nlr: 2.5\n")
    text = "base: [some/middle.yaml, other.yaml]\nlr: 3.0\nmodel_kwargs: {num_heads: 2}\n"
    path = write_config(tmp_path, text)
    args = parse_args(["--config", str(path), "--warmup_epochs", "0"])
    assert (args.lr, args.epochs, args.seed, args.model_kwargs) == (3.0, 8, 1, {"num_heads": 2})


def test_config_with_a_bad_base(refused, tmp_path):
    path = write_config(tmp_path, "base: none.yaml\n")
    assert f"none.yaml, a base of {path}: cannot be read" in refused("--config", path)
    path = write_config(tmp_path, f"base: {path.name}\n")
    assert "is its own base" in refused("--config", path)


def test_value_in_config_is_checked_as_on_the_command_line(refused, tmp_path):
    assert "--mixup_mode" in refused("--config", write_config(tmp_path, "mixup_mode: some\n"))
    path = write_config(tmp_path, "lr: fast\n")
    assert refused("--config", path).startswith(f"--config {path}: --lr: invalid float value: 'fast'")


def test_config_file_that_is_missing(refused, tmp_path):
    assert refused("--config", tmp_path / "none.yaml").startswith(f"--config {tmp_path}/none.yaml: cannot be read")


def test_recipe_may_set_what_a_command_switches_off(tiny_run, tmp_path):
    """A recipe that also evaluates its moving average, run without one."""
    path = write_config(tmp_path, "model_ema: true\nmodel_ema_eval: true\namp_dtype: bfloat16\n")
    main.main([*tiny_run, "--epochs", "1", "--config", str(path), "--model_ema", "false"])


# ---------------------------------------------------------------------------------------------------------
# What is not there


def test_cuda_without_a_gpu(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert refused("--device cuda").startswith("--device cuda: ")


def test_float16_needs_a_gpu(refused):
    assert refused("--use_amp true --amp_dtype float16").startswith("--amp_dtype float16: needs a GPU")


def test_mixed_precision_on_a_cpu_without_bfloat16(refused, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert refused("--use_amp true").startswith("--use_amp true: ")
    assert refused("--use_amp true").endswith("set it to false"), "it may stand in a recipe"


def test_bfloat16_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *including_emulation: False)
    args = parse_args(["--device", "cuda", "--use_amp", "true", "--amp_dtype", "bfloat16"])
    with pytest.raises(InputError, match="--amp_dtype bfloat16: "):
        training.setup.complete_options(args, local_rank=0)


def test_weights_and_biases_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "--enable_wandb true" in refused("--enable_wandb true")


# ---------------------------------------------------------------------------------------------------------
# Files that a run starts from


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """Directory of a finished run of two epochs."""
    directory = tmp_path_factory.mktemp("trained")
    main.main([*tiny_run, "--output_dir", str(directory)])
    return directory


@pytest.mark.parametrize("option", ["--resume", "--initialize", "--finetune"])
def test_weights_file_that_is_missing_or_damaged(refused, trained, tmp_path, option):
    path = tmp_path / "weights.pth"
    assert refused(option, path).startswith(f"{option} {path}: no such file")
    whole = (trained / "checkpoint-1.pth").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(option, path).startswith(f"{option} {path}: not a readable PyTorch file")


def test_directory_without_initial_weights(refused, tmp_path):
    assert refused("--initialize", tmp_path).startswith(f"--initialize {tmp_path}: no vit.pth in that directory")


@pytest.mark.parametrize("content", [{"head.weight": torch.zeros(3, 32)}, torch.zeros(3)])
def test_resume_of_what_is_no_checkpoint(refused, tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    assert refused("--resume", path).startswith(f"--resume {path}: not a checkpoint")


def test_resume_of_another_model(refused, trained):
    path = trained / "checkpoint-1.pth"
    message = refused("--model_kwargs embed_dim=32 depth=3 num_heads=2 patch_size=4 --resume", path)
    assert message.startswith(f"--resume {path}: of another model (vit_tiny): blocks.2.")
    assert message.endswith("; name another checkpoint")


def test_resume_with_another_optimiser(refused, trained):
    path = trained / "checkpoint-0.pth"
    assert refused("--weight_decay 0 --resume", path).startswith(f"--resume {path}: of another optimiser")


def test_initial_weights_of_another_family(refused, tmp_path):
    path = tmp_path / "convnext.pth"
    torch.save(create_model("test_convnext").state_dict(), path)
    message = refused("--initialize", path)
    assert message.startswith(f"--initialize {path}: does not fit this model: ")
    assert message.split()[-3:] == ["cls_token", "is", "missing"]


def test_initial_weights_of_another_size(refused, tmp_path):
    path = tmp_path / "vit.pth"
    torch.save(
        create_model("vit_tiny", embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16).state_dict(), path
    )
    message = refused("--initialize", tmp_path)
    assert (
        f"--initialize {path}: does not fit this model: cls_token is (1, 1, 16), the model's is (1, 1, 32)" in message
    )


# ---------------------------------------------------------------------------------------------------------
# Directories that hold a run


@pytest.fixture
def held(trained, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(trained, tmp_path / "held")


@pytest.mark.parametrize("options", ["--lr 0.002", "--seed 1", "--batch_size 8", "--opt momentum", "--epochs 3"])
def test_directory_that_holds_a_run_with_other_options(refused, held, options):
    before = {path.name: path.read_bytes() for path in held.iterdir()}
    message = refused(f"{options} --output_dir", held)
    assert message.startswith(f"--output_dir {held}: ")
    name, value = options.split()
    if name == "--batch_size":  # how a batch is shared out may change; its total may not
        name, value = "--total_batch_size", "8"
    assert re.search(f"of a run with {name} .*, not {re.escape(value)};", message)
    assert {path.name: path.read_bytes() for path in held.iterdir()} == before


def test_directory_that_holds_a_run_is_not_continued_when_told_not_to(refused, held):
    message = refused("--auto_resume false --output_dir", held)
    assert message.startswith(f"--output_dir {held}: holds a run")
    assert "--overwrite true" in message


def test_run_without_its_checkpoints_is_not_started_over(refused, held):
    for path in held.glob("*.pth"):
        path.unlink()
    assert refused("--output_dir", held).startswith(f"--output_dir {held}: holds a run without a checkpoint")


def test_run_stopped_before_its_first_checkpoint_starts_anew(interrupted, train, tmp_path):
    """The log of an epoch is written before its checkpoint is."""
    interrupted(1, "--save_ckpt_freq 2 --output_dir", tmp_path / "stopped")
    assert len((tmp_path / "stopped" / "log.txt").read_text().splitlines()) == 1
    for name in ("stopped", "whole"):
        train("--save_ckpt_freq 2 --output_dir", tmp_path / name)
    logs = [
        [{k: row[k] for k in ("epoch", "train_loss", "test_acc1")} for row in read_log(tmp_path / name)]
        for name in ("stopped", "whole")
    ]
    assert logs[0] == logs[1]


def test_run_with_damaged_options_is_not_continued(refused, held):
    (held / "args.json").write_bytes((held / "args.json").read_bytes()[:-100])
    assert "args.json is damaged" in refused("--output_dir", held)


@pytest.mark.parametrize("option", ["--output_dir", "--log_dir"])
def test_directory_that_cannot_be_one(refused, tmp_path, option):
    (tmp_path / "x.pth").write_text("")
    assert refused(option, tmp_path / "x.pth").startswith(f"{option} {tmp_path}/x.pth: cannot write there")


def test_overwrite_starts_anew_and_deletes_only_the_run(tiny_run, held):
    (held / "notes.txt").write_text("mine")
    main.main([*tiny_run, "--lr", "0.01", "--epochs", "1", "--overwrite", "true", "--output_dir", str(held)])
    assert {path.name for path in held.glob("checkpoint-*")} == {"checkpoint-0.pth", "checkpoint-best.pth"}
    assert [json.loads(row)["epoch"] for row in (held / "log.txt").read_text().splitlines()] == [0]
    assert json.loads((held / "args.json").read_text())["lr"] == 0.01
    assert (held / "notes.txt").read_text() == "mine"
