"""Directories that from_pretrained opens, and students of Hugging Face's architectures: --format hub, --width."""

import json

import pytest
import safetensors.torch
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from helpers import assert_same, written
from weight_selection import output, select_weights
from weight_selection.cli import main as select_main
from weight_selection.selection import Student

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
TEACHERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=4, vocab_size=20, tie_word_embeddings=True)),
    "vit": (ViTForImageClassification, ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)),
    "bert": (BertForSequenceClassification, BertConfig(**SIZES, vocab_size=20, num_labels=3)),
}
OWN = {"llama": [], "vit": ["classifier.weight", "classifier.bias"], "bert": ["classifier.weight", "classifier.bias"]}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """{name: directory of a teacher that from_pretrained opens}."""
    directory = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    for name, (cls, config) in TEACHERS.items():
        cls(config).save_pretrained(directory / name)
    return {name: directory / name for name in TEACHERS}


def command(directory, output_dir, *more):
    return ["--pretrained_model", f"transformers:{directory}", "--width", "0.5", "--output_dir", output_dir, *more]


@pytest.mark.parametrize("name", TEACHERS)
def test_from_pretrained_opens_a_directory_with_the_selection(name, cli, teachers, tmp_path):
    assert cli(select_main, *command(teachers[name], tmp_path / "hub", "--format", "hub", "--depth", "0.5")) is None
    assert written(tmp_path / "hub") == ["config.json", "model.json", "model.safetensors"]
    cls = TEACHERS[name][0]
    opened, found = cls.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    sizes = {key: value // 2 for key, value in SIZES.items()}
    assert {key: getattr(opened.config, key) for key in sizes} == sizes
    selected = select_weights(cls.from_pretrained(teachers[name]), opened)
    state_dict = opened.state_dict()
    assert_same({key: state_dict[key] for key in selected}, selected)
    assert [key for key in state_dict if key not in selected] == OWN[name]
    assert json.loads((tmp_path / "hub" / "model.json").read_text())["random"] == OWN[name]


def test_a_tied_tensor_is_written_once(cli, teachers, tmp_path):
    assert cli(select_main, *command(teachers["llama"], tmp_path / "hub", "--format", "hub")) is None
    assert cli(select_main, *command(teachers["llama"], tmp_path / "init.safetensors")) is None
    for file in (tmp_path / "hub" / "model.safetensors", tmp_path / "init.safetensors"):
        content = safetensors.torch.load_file(file)
        assert "lm_head.weight" not in content
        assert content["model.embed_tokens.weight"].shape == (20, 16)


def test_the_configuration_says_the_type_of_the_values(cli, teachers, tmp_path):
    named = command(teachers["vit"], tmp_path / "hub", "--format", "hub", "--dtype", "bfloat16")
    assert cli(select_main, *named) is None
    content = safetensors.torch.load_file(tmp_path / "hub" / "model.safetensors")
    assert {value.dtype for value in content.values()} == {torch.bfloat16}
    assert ViTForImageClassification.from_pretrained(tmp_path / "hub", dtype="auto").dtype == torch.bfloat16


def test_of_a_large_student_only_the_modules_that_are_left_out_are_initialised(cli, teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "LARGE", 1000)
    create, devices = Student.create, []

    def noted(self, device="cpu"):
        devices.append(device)
        return create(self, device)

    monkeypatch.setattr(Student, "create", noted)
    assert cli(select_main, *command(teachers["bert"], tmp_path / "hub", "--format", "hub")) is None
    assert devices == ["meta"]
    content = safetensors.torch.load_file(tmp_path / "hub" / "model.safetensors")
    assert not content["classifier.bias"].any()
    assert 0.01 < content["classifier.weight"].std() < 0.03  # of the config: 0.02


def test_the_teachers_own_directory_is_never_written(cli, teachers):
    before = {file.name: file.read_bytes() for file in teachers["vit"].iterdir()}
    message = cli(select_main, *command(teachers["vit"], teachers["vit"], "--format", "hub", "--overwrite"))
    assert "holds the teacher's own weights" in message
    assert {file.name: file.read_bytes() for file in teachers["vit"].iterdir()} == before


def test_a_library_without_directories_is_refused(cli, tmp_path):
    names = ["--pretrained_model", "torchvision:resnet18", "--student", "torchvision:resnet18"]
    message = cli(select_main, *names, "--output_dir", tmp_path / "hub", "--format", "hub")
    assert message.startswith("--format hub: only timm and Hugging Face open directories, and not of a ResNet")
    assert ".safetensors" in message
    assert written(tmp_path) == []
