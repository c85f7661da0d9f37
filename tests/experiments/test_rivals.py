"""The arena of experiments/rivals/: first weights of every arm, and the queue that trains from them."""

from functools import partial
from pathlib import Path

import pytest
import torch

from helpers import assert_same
from rivals import run, schedule, table
from rivals.arms import ABLATIONS, ARMS, CEILING, FINAL, Pair, arm, without_classifier
from rivals.corp import compensated
from rivals.front import front
from rivals.vit_widths import Kept, cut
from training.options import parse_args
from weight_selection.errors import InputError
from weight_selection.sources.timm_models import create_model

SIZES = {"num_heads": 3, "depth": 2, "img_size": 32, "num_classes": 5}


class Made(Pair):
    """A pair that needs no files of images."""

    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3


def vit(width, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = create_model("vit_tiny", embed_dim=width, **SIZES | kwargs).eval()
    for parameter in model.parameters():  # biases and norms differ too
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def pair(width=24, teacher_width=48):
    return Made(vit(teacher_width), vit(width, seed=1), Path(), 0)


@pytest.mark.parametrize("name", [*ARMS, *ABLATIONS])
def test_an_arm_makes_all_weights_but_the_classifiers(name):
    if name in ("l2", "taylor", "hessian"):
        pytest.importorskip("torch_pruning")
    made = arm(name)(pair(48) if name == CEILING else pair())
    model = vit(48 if name == CEILING else 24, seed=2)
    shapes = {key: value.shape for key, value in without_classifier(model).items()}
    assert {key: value.shape for key, value in made.items()} == shapes
    assert all(torch.isfinite(value).all() for value in made.values())


def test_cutting_and_low_frequencies_of_the_teachers_own_size_are_the_teacher():
    same = pair(48)
    own, head = without_classifier(same.teacher), torch.arange(16).expand(3, 16)
    assert_same(cut(same, Kept(torch.arange(48), [torch.arange(192)] * 2, [head] * 2, [head] * 2)), own)
    assert_same(front(same), own, rtol=0, atol=1e-5)


def test_corp_loses_nothing_if_the_units_that_go_are_copies():
    teacher = vit(24)
    for block in teacher.blocks:
        with torch.no_grad():
            block.mlp.fc1.weight[48:], block.mlp.fc1.bias[48:] = block.mlp.fc1.weight[:48], block.mlp.fc1.bias[:48]
            block.mlp.fc2.weight[:, 48:] *= 0.1  # so that these go
    student = vit(24, mlp_ratio=2)
    student.load_state_dict(compensated(teacher, Made.images, 48))
    torch.testing.assert_close(student(Made.images), teacher(Made.images), rtol=0, atol=2e-3)


def fake(accuracy):
    """A way to do a run that takes no time: its accuracy is that of its arm and learning rate."""

    def do(queue, row):
        queue.done.append(schedule.key_of(row))
        figures = {"probe": 1.0, "accuracy": accuracy(row), "seconds_before": 2.0, "seconds_training": 3.0}
        return row | figures | {"torch": "2"}

    return do


def test_the_queue_skips_what_is_finished_and_drops_arms_that_are_behind(tmp_path, monkeypatch, capsys):
    best_rate = {"project": 5e-4, "l2": 1e-3, "taylor": 2e-3}
    level = {"project": 80, "taylor": 75, "l2": 60, "random": 30}
    monkeypatch.setattr(run.Queue, "done", [], raising=False)
    slope = lambda row: level[row["arm"]] - abs(row["lr"] - best_rate.get(row["arm"], 1e-3)) * 1e3  # noqa: E731
    monkeypatch.setattr(run.Queue, "do", fake(slope))
    results = tmp_path / "results.jsonl"
    words = (
        f"--data_path {tmp_path} --output_dir {tmp_path} --results {results} --arms {' '.join(level)} --phase".split()
    )
    run.main([*words, "tune"])
    done = run.Queue.done
    settings = {name: {key[4:6] for key in done if key[2] == name} for name in level}
    ridge = lambda *rates: {(rate, "ridge") for rate in rates}  # noqa: E731
    assert settings["l2"] == ridge(*schedule.FIRST)  # more than ten points behind
    assert settings["project"] == ridge(2.5e-4, 5e-4, 1e-3, 2e-3) | {(5e-4, "random")}
    rising = ridge(5e-4, 1e-3, 2e-3, 4e-3)
    assert settings["random"] == rising | {(1e-3, "random")}  # random is never dropped
    assert settings["taylor"] == rising | {(2e-3, "random")}
    assert len(done) == len(set(done)) == len(schedule.read_results(results))
    run.main([*words, "tune"])
    assert len(done) == len(schedule.read_results(results))  # nothing was left to do
    run.main([*words[:-6], "--arms", "l2", "--phase", "tune", "--lr", "2e-3"])
    assert done.pop()[4] == 2e-3 and len(done) + 1 == len(schedule.read_results(results))
    with pytest.raises(InputError, match="--lr 0.002: has no effect with --phase test"):
        run.main([*words, "test", "--lr", "2e-3"])
    del done[:]
    test = [*words[:-6], "--phase", "test"]
    run.main([*test, "--seeds", "1"])
    assert {key[6] for key in done} == {0} and len(done) == 3
    run.main([*test, "--arms", "l2", "--seeds", "1"])
    assert done.pop()[2] == "l2" and len(done) == 3
    run.main(test)
    assert {(key[2], key[4], key[6]) for key in done} == {
        (name, best_rate.get(name, 1e-3), seed) for name in ("project", "taylor", "random") for seed in (0, 1, 2)
    }
    capsys.readouterr()
    table.main(["--results", str(results), "--figure", str(tmp_path / "figure.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| first weights | probe | 0.00025 | 0.0005 | 0.001 | 0.002 | 0.004 | random classifier | test (seeds) "
        "| CPU seconds before training |"
    )
    assert lines[2] == "| project | 1.0 | 79.8 | **80.0** | 79.5 | 78.5 |  | **80.0** | 80.0 ± 0.0 (3) | 2 |"
    assert lines[4] == "| Torch-Pruning, L2 | 1.0 |  | 59.5 | **60.0** | 59.0 |  |  | 60.0 (1) | 2 |"
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_ablations_train_at_the_settings_of_the_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.Queue, "done", [], raising=False)
    monkeypatch.setattr(run.Queue, "do", fake(lambda row: 50 - abs(row["lr"] - 2e-3) * 1e3 - ("_" in row["arm"])))
    results = tmp_path / "results.jsonl"
    words = f"--data_path {tmp_path} --output_dir {tmp_path} --results {results} --phase".split()
    with pytest.raises(InputError, match="--phase ablate: no such arm of --student vit_half is tuned"):
        run.main([*words, "ablate"])
    run.main([*words, "tune", "--arms", "greedy"])  # and not project
    del run.Queue.done[:]
    run.main([*words, "ablate", "--seeds", "2"])
    names = {"greedy", *(name for name in ABLATIONS if name.startswith("greedy_"))}
    assert {key[2:] for key in run.Queue.done} == {
        (name, 20, 2e-3, "ridge", seed, "ablate") for name in names for seed in (0, 1)
    }
    capsys.readouterr()
    table.main(["--results", str(results), "--ablations"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| greedy | 1.0 ± 0.0 | 50.0 ± 0.0 | 2 |"
    assert "| greedy_noise | 1.0 ± 0.0 | 49.0 ± 0.0 | 2 |" in lines and len(lines) == 2 + len(names)


def test_a_part_taken_out_and_other_images_change_the_weights():
    made = {name: arm(name)(pair()) for name in ("greedy", *ABLATIONS) if name.startswith("greedy")}
    whole = made.pop("greedy")
    changed = {
        name for name, weights in made.items() if any(not torch.equal(weights[key], whole[key]) for key in whole)
    }
    assert changed == made.keys() - {"greedy_others"}  # whose images are the pair's own here


@pytest.mark.parametrize("student", schedule.STUDENTS)
def test_images_are_normalised_as_the_teachers_were(tmp_path, student):
    (tmp_path / "cifar100_50").mkdir()
    args = run.get_args_parser().parse_args(["--phase", "test", "--data_path", str(tmp_path), "--output_dir", "out"])
    words = run.Queue(args).recipe(
        {"student": student, "data": "cifar100", "phase": "test", "arm": "greedy", "seed": 3}
    )
    options = parse_args([str(word) for word in [*words, "--output_dir", str(tmp_path / "out")]])
    assert options.imagenet_default_mean_and_std is False and options.seed == 3


def test_the_arms_that_go_on_are_arms():
    assert {*FINAL, CEILING, *(arm for student in schedule.STUDENTS.values() for arm in student.arms)} <= ARMS.keys()


def test_another_student_is_tuned_by_itself_or_takes_anothers_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(run.Queue, "done", [], raising=False)
    monkeypatch.setattr(run.Queue, "do", fake(lambda row: 50 - abs(row["lr"] - 2e-3)))
    words = f"--data_path {tmp_path} --output_dir {tmp_path} --results {tmp_path / 'results.jsonl'} --student".split()
    run.main([*words, "vit_half", "--phase", "tune", "--arms", "greedy"])
    run.main([*words, "lite0_half", "--phase", "tune", "--arms", "greedy"])
    del run.Queue.done[:]
    run.main([*words, "lite0", "--phase", "test"])
    assert {key[:1] + key[2:3] + key[4:5] for key in run.Queue.done} == {("lite0", "greedy", 2e-3)}
    with pytest.raises(InputError, match="no finished runs of lite0 on cifar100"):
        table.main(["--results", str(tmp_path / "results.jsonl"), "--student", "lite0", "--data", "cifar100"])
    with pytest.raises(InputError, match="--student lite0: .*tune that"):
        run.main([*words, "lite0", "--phase", "tune"])
    with pytest.raises(InputError, match="--arms project: is not in --phase test of --student lite0"):
        run.main([*words, "lite0", "--phase", "test", "--arms", "project"])


@pytest.mark.parametrize("name", ["selection", "taylor"])
def test_an_arm_makes_a_narrower_convnet(name):
    if ARMS[name][0] == "pruned":
        pytest.importorskip("torch_pruning")
    create = partial(create_model, "tf_efficientnet_lite0", input_size=32, num_classes=5)
    student = create(channel_multiplier=0.5)
    made = arm(name)(Made(create().eval(), student, Path(), 0))
    assert {key: value.shape for key, value in made.items()} == {
        key: value.shape for key, value in without_classifier(student).items()
    }
