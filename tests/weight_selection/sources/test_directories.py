"""Directories of weights: the layouts that libraries write, shards, and what is wrong with a directory."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict

from helpers import assert_same, read
from pairs import VIT
from weight_selection import InputError
from weight_selection.cli import main as select_main
from weight_selection.options import SelectionOptions
from weight_selection.selection import Selection, Student, Teacher
from weight_selection.sources.weight_files import read_weights

INDEX = "model.safetensors.index.json"
SKELETON = VIT.models()[0]  # of the teacher


def save_shards(state_dict, directory, safe=True):
    """As save_pretrained does, in several files and an index."""
    save_torch_state_dict(state_dict, directory, max_shard_size="100KB", safe_serialization=safe)
    assert len([path for path in directory.iterdir() if "-of-" in path.name]) > 2


LAYOUTS = {
    "model.safetensors": lambda state, path: safetensors.torch.save_file(state, path / "model.safetensors"),
    INDEX: save_shards,
    "pytorch_model.bin": lambda state, path: torch.save(state, path / "pytorch_model.bin"),
    "pytorch_model.bin.index.json": lambda state, path: save_shards(state, path, safe=False),
    "checkpoint-best.pth": lambda state, path: torch.save({"model": state, "epoch": 3}, path / "checkpoint-best.pth"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_directories_of_every_layout_give_what_the_file_gives(layout, weights, selected, cli, tmp_path):
    (tmp_path / "saved").mkdir()
    LAYOUTS[layout](weights["vit"], tmp_path / "saved")
    assert (tmp_path / "saved" / layout).is_file()
    assert_same(read_weights(tmp_path / "saved", "weights"), weights["vit"])
    assert cli(select_main, *VIT.command(tmp_path / "out.pth", tmp_path / "saved")) is None
    assert_same(read(tmp_path / "out.pth"), selected["vit"])
    files = [path for path in (tmp_path / "saved").iterdir() if path.suffix != ".json"]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    record = json.loads((tmp_path / "out.json").read_text())["teacher"]
    assert record["sha256"] == (digests if len(digests) > 1 else digests.popitem()[1])
    assert record["source"] == str(tmp_path / "saved")


def test_shards_of_which_nothing_is_selected_are_not_read(weights, selected, tmp_path):
    save_shards(weights["vit"], tmp_path)
    teacher, student = Teacher(VIT.teacher, VIT.large, tmp_path), Student(VIT.student, VIT.small)
    selection = Selection(teacher, student, SelectionOptions())
    assert selection.opened[0].keys() == weights["vit"].keys()
    needed = {entry.teacher_key for entry in selection.plan.selected.values()}
    shards = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    spare = set(shards.values()) - {shards[key] for key in needed}
    assert spare
    for name in spare:
        (tmp_path / name).unlink()
    assert_same(selection.weights(), selected["vit"])


@pytest.fixture
def shards(weights, tmp_path):
    """A directory of shards, and the names of these."""
    save_shards(weights["vit"], tmp_path)
    return tmp_path, sorted(path.name for path in tmp_path.glob("*-of-*"))


def refusal(directory):
    """The error of reading a directory for the small teacher."""
    with pytest.raises(InputError) as refused:
        Teacher(VIT.teacher, VIT.large, directory).open(SKELETON, include_head=False)
    message = str(refused.value)
    assert message.startswith(f"weights {directory}")
    assert "\n" not in message
    return message


def test_a_missing_shard_is_named(shards):
    directory, names = shards
    (directory / names[1]).unlink()
    assert f"{INDEX} names {names[1]}, which is missing; copy it into the directory" in refusal(directory)


def test_a_shard_that_is_cut_off_is_named(shards):
    directory, names = shards
    whole = (directory / names[1]).read_bytes()
    (directory / names[1]).write_bytes(whole[: len(whole) // 2])
    assert f"{names[1]}: not a readable safetensors file" in refusal(directory)


def test_a_shard_without_its_tensors_is_refused(shards):
    directory, names = shards
    key, *others = content = safetensors.torch.load_file(directory / names[1])
    safetensors.torch.save_file({other: content[other] for other in others}, directory / names[1])
    assert f"not the weights of this teacher: {key} is missing" in refusal(directory)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{no", "cannot be read (not JSON"),
        ("[]", "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "has no weight_map"),
        ({"weight_map": {"a": "../secret.safetensors"}}, "outside of the directory, '../secret.safetensors'"),
        ({"weight_map": {"a": "x/../../secret.safetensors"}}, "outside of the directory"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside of the directory, '/etc/passwd'"),
        ({"weight_map": {"a": "..\\secret.safetensors"}}, "outside of the directory"),
    ],
)
def test_an_index_of_a_stranger_cannot_lead_out_of_its_directory(content, named, weights, tmp_path):
    safetensors.torch.save_file(weights["vit"], tmp_path / "secret.safetensors")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    message = refusal(tmp_path / "x")
    assert INDEX in message
    assert named in message


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    message = refusal(tmp_path)
    assert "no weights in it" in message
    assert all(name in message for name in LAYOUTS)


def test_adapters_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    safetensors.torch.save_file({"lora_A": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert "holds an adapter (adapter_config.json), not a model; merge it into its base model" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "dtype"),
    [
        ("model.safetensors", torch.int8),
        ("model.safetensors", torch.float8_e4m3fn),
        ("pytorch_model.bin", torch.int8),
        ("pytorch_model.bin", torch.uint8),
    ],
)
def test_quantised_weights_are_refused_with_what_to_do(file, dtype, weights, tmp_path):
    key = "blocks.0.mlp.fc1.weight"
    LAYOUTS[file]({**weights["vit"], key: torch.zeros(192, 48).to(dtype)}, tmp_path)
    message = refusal(tmp_path)
    assert f"{key} is quantised" in message
    assert "give the original weights, in float32, float16 or bfloat16" in message
