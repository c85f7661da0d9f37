"""Runs of main.py from end to end, in this process: what they learn, what they leave on disk, how they go on."""

import json
import math
import re
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import optim_factory
import training.run
from distributed.program import RunError
from helpers import TEST_IMAGES, TRAIN_IMAGES, assert_same, differ, read_checkpoint, read_log, read_results
from optim_factory import cosine_schedule
from training import checkpoint
from weight_selection.errors import InputError
from weight_selection.files import PARTIAL, sha256
from weight_selection.sources.timm_models import create_model

PLAIN = "--aa none --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0 --hflip 0 --scale 1 1"  # no randomness in images
BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 arithmetic"
)


def tiny_state(seed=3, **kwargs):
    """Weights for the tiny model, not those a run would draw."""
    torch.manual_seed(seed)
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16, "num_classes": 3}
    return create_model("vit_tiny", **(size | kwargs)).state_dict()


# ---------------------------------------------------------------------------------------------------------
# What a run leaves


FIRST_WEIGHTS = {"teacher": {"name": "vit_small"}, "student": {"name": "vit_tiny"}, "options": {"seed": 0}}


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """Directory of a run of four epochs from initial weights in a directory, with a moving average and TensorBoard."""
    directory = tmp_path_factory.mktemp("finished")
    (directory / "init").mkdir()
    backbone = {key: value for key, value in tiny_state().items() if not key.startswith("head.")}
    torch.save(backbone, directory / "init" / "vit.pth")
    content = {"sha256": sha256(directory / "init" / "vit.pth"), "left_out": ["head.weight"], **FIRST_WEIGHTS}
    (directory / "init" / "vit.json").write_text(json.dumps(content))
    train(
        "--epochs 4 --warmup_steps -1 --warmup_epochs 1 --save_ckpt_num 2 --seed 5",
        "--model_ema true --model_ema_decay 0.9 --model_ema_eval true",
        f"--initialize {directory}/init --output_dir {directory}/run --log_dir {directory}/board",
    )
    return directory


def test_log_has_one_row_of_metrics_per_epoch(finished):
    rows = read_log(finished / "run")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    schedule = cosine_schedule(1e-3, 1e-6, total_steps=12, warmup_steps=3)
    for row in rows:
        assert row["n_parameters"] == sum(value.numel() for value in tiny_state().values())
        assert row["train_lr"] == pytest.approx(schedule[3 * row["epoch"] + 2]), "of the epoch's last step"
        assert 0 < row["train_loss"] < 2
        assert 0 < row["test_loss"] < 2
        hits = row["test_acc1"] * TEST_IMAGES / 100
        assert hits == pytest.approx(round(hits)), "over exactly the test images"
        assert row["test_acc5"] == 100, "of three classes"


def test_results_say_what_was_run_and_what_came_out(finished):
    results, rows = read_results(finished / "run"), read_log(finished / "run")
    best = max(rows, key=lambda row: row["test_acc1"])  # the first of several
    for name, row in (("best", best), ("last", rows[-1])):
        expected = {"epoch": row["epoch"], **{key: row[f"test_{key}"] for key in ("acc1", "acc5", "loss")}}
        assert results[name] == expected
    assert results["last_ema"]["acc1"] == rows[-1]["test_acc1_ema"]
    file = finished / "init" / "vit.pth"
    facts = {
        "epochs": 4,
        "seed": 5,
        "model": "vit_tiny",
        "data_set": "image_folder",
        "train_images": TRAIN_IMAGES,
        "test_images": TEST_IMAGES,
        "total_batch_size": 16,
        "initialize": str(file),
        "initialize_sha256": sha256(file),
        "first_weights": FIRST_WEIGHTS,
    }
    assert facts.items() <= results.items()
    assert results["wall_time"] > 0
    assert results["versions"]["torch"] == torch.__version__
    assert {"timm", "torchvision", "python"} <= results["versions"].keys()


def test_checkpoints_hold_plain_types_under_the_documented_keys(finished):
    names = {path.name for path in (finished / "run").glob("*.pth")}
    assert names == {f"checkpoint-{name}.pth" for name in ("2", "3", "best", "best-ema")}, "two numbered ones are kept"
    rows = read_log(finished / "run")
    for name in ("2", "3", "best"):
        checkpoint = read_checkpoint(finished / "run", name)
        assert {"model", "optimizer", "epoch", "scaler", "args", "model_ema"} <= checkpoint.keys()
        assert type(checkpoint["args"]) is dict
        assert {type(group["lr"]) for group in checkpoint["optimizer"]["param_groups"]} == {float}
        assert checkpoint["args"]["seed"] == 5
        assert checkpoint["model"].keys() == checkpoint["model_ema"].keys() == tiny_state().keys()
        assert checkpoint["model"]["pos_embed"].shape == (1, 1 + 16, 32), "--input_size reaches the ViT"
        expected = max(rows, key=lambda row: row["test_acc1"])["epoch"] if name == "best" else int(name)
        assert checkpoint["epoch"] == expected


def test_tensorboard_gets_the_metrics_of_the_log(finished):
    events = EventAccumulator(str(finished / "board")).Reload()
    rows = read_log(finished / "run")
    last_steps, epochs = [2, 5, 8, 11], [0, 1, 2, 3]
    for tag, key, steps in (("opt/lr", "train_lr", last_steps), ("perf/test_acc1", "test_acc1", epochs)):
        assert [event.step for event in events.Scalars(tag)] == steps
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([row[key] for row in rows])
    by_step = {"loss/loss", "opt/lr", "opt/min_lr", "opt/weight_decay", "opt/grad_norm"}
    tested = {f"perf/test_{name}{average}" for name in ("acc1", "acc5", "loss") for average in ("", "_ema")}
    assert set(events.Tags()["scalars"]) == by_step | tested | {"perf/train_images_per_second"}, "no constants"


def test_finished_run_is_left_as_it_is(finished, train, monkeypatch, capsys):
    def no_training(*args):
        raise AssertionError("trained a finished run")

    files = {path.name: path.read_bytes() for path in (finished / "run").iterdir()}
    monkeypatch.setattr(training.run, "train_one_epoch", no_training)
    train(
        "--epochs 4 --warmup_steps -1 --warmup_epochs 1 --save_ckpt_num 2 --seed 5",
        "--model_ema true --model_ema_decay 0.9 --model_ema_eval true",
        f"--initialize {finished}/init --output_dir {finished}/run",
    )
    assert "nothing left to train" in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in (finished / "run").iterdir()}
    assert files.keys() == after.keys()
    assert {name for name in files if files[name] != after[name]} <= {"args.json", "results.json"}
    before = json.loads(files["results.json"])
    assert {key: before[key] for key in before if key != "args"} == {
        key: value for key, value in read_results(finished / "run").items() if key != "args"
    }, "wall time included"


def evaluated(train, capsys, *options):
    """The metrics that an evaluation prints."""
    capsys.readouterr()
    train("--eval true", *options)
    return {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", capsys.readouterr().out.split(":")[-1])}


def test_evaluation_of_a_checkpoint_gives_the_logged_metrics(finished, train, capsys):
    best = read_results(finished / "run")["best"]
    found = evaluated(train, capsys, "--resume", finished / "run" / "checkpoint-best.pth")
    assert found["acc1"] == pytest.approx(best["acc1"], rel=1e-4)
    assert found["loss"] == pytest.approx(best["loss"], rel=1e-4)
    assert found["images"] == TEST_IMAGES


def test_evaluation_needs_no_full_batch_of_training_images(finished, train, capsys):
    assert TRAIN_IMAGES < 64
    path = finished / "run" / "checkpoint-best.pth"
    assert evaluated(train, capsys, "--batch_size 64 --resume", path)["images"] == TEST_IMAGES


def test_moving_average_is_kept_and_evaluated(finished, train, capsys):
    path = finished / "run" / "checkpoint-3.pth"
    checkpoint, row = read_checkpoint(finished / "run", 3), read_log(finished / "run")[3]
    assert differ(checkpoint["model"], checkpoint["model_ema"])
    found = evaluated(train, capsys, "--model_key model_ema --finetune", path)
    assert found["loss"] == pytest.approx(row["test_loss_ema"], rel=1e-4)
    assert row["test_loss_ema"] != row["test_loss"]


# ---------------------------------------------------------------------------------------------------------
# What a step does


def test_loss_falls_and_easy_images_are_learnt(train, tmp_path):
    train(f"{PLAIN} --epochs 5 --lr 5e-3 --output_dir {tmp_path}")
    rows = read_log(tmp_path)
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]
    assert read_results(tmp_path)["last"]["acc1"] > 90


@pytest.mark.parametrize(
    "model", ["", "--model convnext_femto --input_size 32 --model_kwargs depths=(1,1,1,1) dims=(8,8,16,16)"]
)
def test_accumulated_micro_batches_equal_one_large_batch(train, tmp_path, model):
    same = f"{model} --mixup 0 --cutmix 0 --opt momentum --lr 0.1 --epochs 2"  # images are augmented all the same
    train(f"{same} --batch_size 24 --output_dir {tmp_path}/large")
    train(f"{same} --batch_size 6 --update_freq 4 --output_dir {tmp_path}/small")
    train(f"{same} --total_batch_size 24 --batch_size 8 --output_dir {tmp_path}/total")
    large = read_checkpoint(tmp_path / "large", 1)["model"]
    for name in ("small", "total"):
        assert_same(read_checkpoint(tmp_path / name, 1)["model"], large, rtol=1e-4, atol=1e-6)
        for row, expected in zip(read_log(tmp_path / name), read_log(tmp_path / "large"), strict=True):
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
            assert row["train_grad_norm"] == pytest.approx(expected["train_grad_norm"], rel=1e-4)


ONE_STEP = f"{PLAIN} --epochs 1 --batch_size 48 --opt momentum --weight_decay 0"


@pytest.mark.parametrize("precision", ["", pytest.param("--use_amp true", marks=BFLOAT16)])
def test_clipping_bounds_the_step_and_the_norm_before_it_is_logged(train, tmp_path, precision):
    torch.save(tiny_state(), tmp_path / "first.pth")
    start = f"{ONE_STEP} {precision} --lr 1 --initialize {tmp_path}/first.pth"
    train(f"{start} --output_dir {tmp_path}/free")
    train(f"{start} --clip_grad 0.25 --output_dir {tmp_path}/clipped")
    norms = {name: read_log(tmp_path / name)[0]["train_grad_norm"] for name in ("free", "clipped")}
    assert norms["clipped"] == norms["free"] > 0.3
    first = tiny_state()
    for name, expected in (("free", norms["free"]), ("clipped", 0.25)):
        weights = read_checkpoint(tmp_path / name, 0)["model"]
        step = math.sqrt(sum((weights[key] - first[key]).square().sum().item() for key in first))
        assert step == pytest.approx(expected, rel=1e-3), "learning rate 1: the step is the gradient"


# Each kernel takes a C++ compiler a second or two: it compiles no block, whose graphs are taken but not compiled.
@pytest.mark.parametrize(("backend", "depth"), [("inductor", 0), ("eager", 1)])
def test_compiled_run_computes_the_same(train, tmp_path, capsys, monkeypatch, backend, depth):
    compiled_modules, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: (compiled_modules.append(self), compile_module(self, backend=backend))[1],
    )
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        size = f"embed_dim=32 depth={depth} num_heads=2 patch_size=4"
        train(f"--epochs 1 --model_kwargs {size} --compile {compiled} --output_dir", tmp_path / name)
        said = capsys.readouterr().out
    if "--compile true: goes on without" in said:
        pytest.skip("no compiler on this machine")
    assert len(compiled_modules) == 1
    assert read_log(tmp_path / "plain")[0] == pytest.approx(read_log(tmp_path / "compiled")[0], rel=1e-4)
    assert_same(*(read_checkpoint(tmp_path / name, 0)["model"] for name in ("plain", "compiled")), rtol=1e-3, atol=1e-5)


def test_run_goes_on_under_another_way_to_compute(train, tmp_path, monkeypatch):
    """As when a run on a CPU goes on on a GPU, where the optimiser is fused: its step counts must follow."""
    train("--output_dir", tmp_path / "plain")
    train("--epochs 2 --save_ckpt_num 2 --output_dir", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1.pth").unlink()
    create = optim_factory.create_optimizer_v2
    made = []

    def fused(*args, **kwargs):
        made.append(create(*args, **kwargs, fused=True))
        return made[-1]

    monkeypatch.setattr(optim_factory, "create_optimizer_v2", fused)
    train("--epochs 2 --save_ckpt_num 2 --output_dir", tmp_path / "run")
    assert [group["fused"] for group in made[0].param_groups] == [True, True]
    assert read_log(tmp_path / "run")[1] == pytest.approx(read_log(tmp_path / "plain")[1], rel=1e-4)


def test_compiler_that_fails_is_said_and_done_without(train, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no\ncompiler")

    train("--output_dir", tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: fails)
    train("--compile true --output_dir", tmp_path / "run")
    assert "warning: --compile true: goes on without, as it failed (RuntimeError: no)" in capsys.readouterr().out
    assert (tmp_path / "run" / "log.txt").read_text() == (tmp_path / "plain" / "log.txt").read_text()


def test_channels_last_computes_the_same(train, tmp_path):
    model = "--model convnext_femto --input_size 32 --model_kwargs depths=(1,1,1,1) dims=(8,8,16,16)"
    for value in ("false", "true"):
        train(f"{model} --epochs 1 --channels_last {value} --output_dir", tmp_path / value)
    assert read_log(tmp_path / "false")[0] == pytest.approx(read_log(tmp_path / "true")[0], rel=1e-4)
    kernel = "stages.0.blocks.0.conv_dw.weight"
    weights = [read_checkpoint(tmp_path / value, 0)["model"][kernel] for value in ("false", "true")]
    assert [weight.stride() for weight in weights] == [(49, 49, 7, 1), (49, 1, 7, 1)], "of 8 kernels of 1 x 7 x 7"


def test_moving_average_moves_by_its_decay(train, tmp_path):
    torch.save(tiny_state(), tmp_path / "first.pth")
    ema = "--model_ema true --model_ema_decay 0.75"
    train(f"{ONE_STEP} {ema} --lr 0.1 --initialize {tmp_path}/first.pth --output_dir {tmp_path}/run")
    checkpoint, first = read_checkpoint(tmp_path / "run", 0), tiny_state()
    expected = {key: 0.75 * first[key] + 0.25 * checkpoint["model"][key] for key in first}
    assert_same(checkpoint["model_ema"], expected, rtol=1e-5, atol=1e-7)
    assert differ(checkpoint["model"], first)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("", torch.float32), pytest.param("--use_amp true", torch.bfloat16, marks=BFLOAT16)],
)
def test_mixed_precision_on_cpu_computes_in_bfloat16_and_keeps_float32_weights(
    train, tmp_path, monkeypatch, precision, dtype
):
    computed, train_one_epoch = [], training.run.train_one_epoch

    def observed(state, *args):
        state.model.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, out: computed.append(out.dtype))
        return train_one_epoch(state, *args)

    monkeypatch.setattr(training.run, "train_one_epoch", observed)
    train(f"{precision} --epochs 1 --output_dir {tmp_path}")
    assert set(computed) == {dtype}
    assert {value.dtype for value in read_checkpoint(tmp_path, 0)["model"].values()} == {torch.float32}
    assert math.isfinite(read_log(tmp_path)[0]["train_loss"])


# ---------------------------------------------------------------------------------------------------------
# First weights. With a learning rate of 0 the checkpoint still holds them.

STAND_STILL = "--epochs 1 --lr 0 --min_lr 0"


@pytest.mark.parametrize("what", ["vit.pth", ""])
def test_run_starts_from_the_initial_weights_of_a_file_or_directory(train, tmp_path, what, capsys):
    state = {key: value for key, value in tiny_state().items() if not key.startswith("head.")}
    torch.save(state, tmp_path / "vit.pth")
    train(f"{STAND_STILL} --initialize {tmp_path}/{what} --output_dir {tmp_path}/run")
    model = read_checkpoint(tmp_path / "run", 0)["model"]
    assert_same({key: model[key] for key in state}, state)
    assert "random: head.weight, head.bias" in capsys.readouterr().out


def test_finetuning_on_other_classes_replaces_only_the_classifier(finished, train, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "two_classes")
    for part in ("train", "val"):
        shutil.rmtree(data / part / "red")
    path = finished / "run" / "checkpoint-3.pth"
    options = f"{STAND_STILL} --batch_size 8 --data_path {data}"
    train(f"{options} --finetune {path} --output_dir {tmp_path}/tuned")
    train(f"{options} --output_dir {tmp_path}/fresh")
    tuned, fresh = (read_checkpoint(tmp_path / name, 0)["model"] for name in ("tuned", "fresh"))
    source = read_checkpoint(finished / "run", 3)["model"]
    head = {"head.weight", "head.bias"}
    assert_same({key: tuned[key] for key in tuned.keys() - head}, {key: source[key] for key in source.keys() - head})
    assert_same({key: tuned[key] for key in head}, {key: fresh[key] for key in head})
    assert tuned["head.weight"].shape == (2, 32)


def test_finetuning_on_the_same_classes_keeps_the_classifier(finished, train, tmp_path):
    train(f"{STAND_STILL} --finetune {finished}/run/checkpoint-3.pth --output_dir {tmp_path}")
    assert_same(read_checkpoint(tmp_path, 0)["model"], read_checkpoint(finished / "run", 3)["model"])
    with pytest.raises(InputError, match="--head_init_scale 2.0: .*checkpoint-3.pth has the classifier too"):
        train(f"--head_init_scale 2 --finetune {finished}/run/checkpoint-3.pth")


def test_xavier_draws_linear_weights_between_its_bounds(train, tmp_path):
    train(f"{STAND_STILL} --init xavier --output_dir {tmp_path}")
    weight = read_checkpoint(tmp_path, 0)["model"]["blocks.0.mlp.fc1.weight"]
    bound = math.sqrt(6 / sum(weight.shape))
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_layer_scale_and_classifier_start_as_told(train, tmp_path):
    model = "--model convnext_femto --input_size 32 --model_kwargs depths=(1,1,1,1) dims=(8,8,8,8)"
    train(f"{STAND_STILL} {model} --output_dir {tmp_path}/default")
    train(f"{STAND_STILL} {model} --layer_scale_init_value 0.5 --head_init_scale 3 --output_dir {tmp_path}/told")
    default, told = (read_checkpoint(tmp_path / name, 0)["model"] for name in ("default", "told"))
    gammas = [key for key in told if key.endswith(".gamma")]
    assert len(gammas) == 4
    for key in gammas:
        assert default[key].unique().tolist() == pytest.approx([1e-6])
        assert told[key].unique().tolist() == [0.5]
    assert torch.equal(told["head.fc.weight"], 3 * default["head.fc.weight"])


def test_seed_decides_the_first_weights_and_the_run(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(f"--epochs 1 --seed {seed} --output_dir {tmp_path / name}")
    a, b, c = (read_checkpoint(tmp_path / name, 0)["model"] for name in "abc")
    assert_same(a, b)
    assert differ(a, c)


# ---------------------------------------------------------------------------------------------------------
# Going on


def test_interrupted_run_ends_like_an_uninterrupted_one(train, interrupted, tmp_path):
    """With all that is random switched on, and with an epoch in the log that is in no numbered checkpoint."""
    options = "--epochs 4 --drop_path 0.2 --model_ema true --model_ema_decay 0.8 --model_ema_eval true"
    options += " --save_ckpt_freq 2 --update_freq 2 --batch_size 8 --num_workers 1"  # or images reseed this process
    train(options, "--output_dir", tmp_path / "whole")
    interrupted(3, options, "--output_dir", tmp_path / "parts")
    assert [row["epoch"] for row in read_log(tmp_path / "parts")] == [0, 1, 2]
    assert [path.name for path in checkpoint.numbered(tmp_path / "parts")] == ["checkpoint-1.pth"]
    train(options, "--output_dir", tmp_path / "parts")

    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")
    whole, parts = (read_checkpoint(tmp_path / name, 3) for name in ("whole", "parts"))
    assert_same(parts["model"], whole["model"])
    assert_same(parts["model_ema"], whole["model_ema"])
    states = [checkpoint["optimizer"]["state"] for checkpoint in (parts, whole)]
    assert states[0].keys() == states[1].keys()
    for number in states[0]:
        assert_same(states[0][number], states[1][number])
    metrics = [
        {key: read_results(tmp_path / name)[key] for key in ("best", "last", "best_ema", "last_ema")}
        for name in ("parts", "whole")
    ]
    assert metrics[0] == metrics[1]


def test_best_accuracy_outlives_an_interruption(train, interrupted, tmp_path):
    """Weights that stand still are as good in every epoch; the first to reach it stays the best."""
    options = f"--epochs 3 --lr 0 --min_lr 0 --output_dir {tmp_path}"
    interrupted(1, options)
    train(options)
    results = read_results(tmp_path)
    assert results["best"]["epoch"] == read_checkpoint(tmp_path, "best")["epoch"] == 0
    assert results["last"]["epoch"] == 2
    assert results["best"]["acc1"] == results["last"]["acc1"]


def test_full_disk_leaves_the_checkpoints_before_and_the_run_goes_on_later(train, interrupted, tmp_path, monkeypatch):
    def full_disk(value, file):
        file.write(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    interrupted(1, "--output_dir", tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(RunError, match=f"cannot write {tmp_path}/checkpoint-.*disk full"):
            train("--output_dir", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")} == files
    assert not list(tmp_path.glob(f"{PARTIAL}*")), "no temporary files"
    train("--output_dir", tmp_path)
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1]


def test_run_whose_model_options_are_tuples_goes_on(train, interrupted, tmp_path):
    options = "--model convnext_femto --input_size 32 --model_kwargs depths=(1,1,1,1) dims=(8,8,8,8)"
    interrupted(1, options, "--output_dir", tmp_path)
    train(options, "--output_dir", tmp_path)
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1]


def test_checkpoint_is_continued_in_a_directory_of_its_own(train, interrupted, tmp_path):
    interrupted(1, "--output_dir", tmp_path / "first")
    train("--output_dir", tmp_path / "first")
    train("--resume", tmp_path / "first" / "checkpoint-0.pth", "--output_dir", tmp_path / "second")
    first, second = (read_checkpoint(tmp_path / name, 1)["model"] for name in ("first", "second"))
    assert_same(first, second)
    assert read_results(tmp_path / "second")["last"] == read_results(tmp_path / "first")["last"]


def test_moving_average_that_is_not_kept_on_has_no_results(finished, train, tmp_path):
    train(f"--epochs 5 --resume {finished}/run/checkpoint-3.pth --output_dir {tmp_path}")
    assert read_results(tmp_path).keys() & {"best", "last", "best_ema", "last_ema"} == {"best", "last"}


def test_checkpoint_of_one_run_is_not_continued_into_the_log_of_another(train, tmp_path):
    for name, lr in (("first", "1e-3"), ("second", "2e-3")):
        train(f"--lr {lr} --output_dir", tmp_path / name)
    log = (tmp_path / "second" / "log.txt").read_bytes()
    with pytest.raises(InputError, match=f"--output_dir {tmp_path}/second"):
        train("--resume", tmp_path / "first" / "checkpoint-0.pth", "--output_dir", tmp_path / "second")
    assert (tmp_path / "second" / "log.txt").read_bytes() == log


def test_evaluation_now_and_then_and_after_the_last_epoch(train, tmp_path):
    train(f"--epochs 5 --eval_interval 2 --output_dir {tmp_path}/interval")
    train(f"--epochs 3 --disable_eval true --output_dir {tmp_path}/disabled")
    assert ["test_acc1" in row for row in read_log(tmp_path / "interval")] == [False, True, False, True, True]
    assert ["test_acc1" in row for row in read_log(tmp_path / "disabled")] == [False, False, True]


def test_time_of_a_run_without_checkpoints_is_counted(train, tmp_path):
    train(f"--epochs 1 --save_ckpt false --output_dir {tmp_path}")
    assert not list(tmp_path.glob("*.pth"))
    assert read_results(tmp_path)["wall_time"] > 0


def test_nothing_is_written_without_output_dir(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("--epochs 1")
    assert list(tmp_path.iterdir()) == []
