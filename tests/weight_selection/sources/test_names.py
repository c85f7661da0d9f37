"""Models by name, of any library: what is selected is what the module itself gives; a mistake is one line."""

import hashlib
import json
import re

import pytest
import timm
import torch
import torchvision
from torch import nn

from helpers import assert_same, prefixed, read, words
from pairs import VIT
from saved_models import LARGE, SMALL, build, save
from weight_selection import InputError, select_weights
from weight_selection.cli import main as select_main
from weight_selection.sources import names
from weight_selection.sources.timm_models import create_model


def meta_of(model):
    """The same model without weights."""
    with torch.device("meta"):
        return type(model)(model.config)


# ---------------------------------------------------------------------------------------------------------
# Hugging Face


def opened(model, path):
    """What a file or directory holds for a model, which has no weights of its own; under the model's names."""
    return dict(names.open_weights(path, meta_of(model), "weights").weights)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "LlamaForCausalLM", "BertForMaskedLM", "Dinov2Model"])
def test_shards_of_transformers_hold_what_the_module_holds(name, tmp_path):
    # A ViT's files have other names than the model, a tied head is in no file, Dinov2's files have two layers in one.
    model = build(name, LARGE)
    save(model, tmp_path, "8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same(opened(model, tmp_path), model.state_dict())


def test_a_name_and_its_directory_and_the_module_give_the_same_tensors(tmp_path):
    teacher, student = build("ViTForImageClassification", LARGE), build("ViTForImageClassification", SMALL)
    directory, expected = save(teacher, tmp_path, "8KB"), select_weights(teacher, student)
    assert_same(select_weights(f"transformers:{directory}", student), expected)
    assert_same(select_weights(meta_of(teacher), student, weights=directory), expected)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "LlamaForCausalLM", "BertForMaskedLM"])
def test_a_file_of_lightning_fills_a_model_of_transformers(name, tmp_path):
    model = build(name, LARGE)
    torch.save({"state_dict": prefixed("model.", model.state_dict())}, tmp_path / "x.ckpt")
    assert_same(opened(model, tmp_path / "x.ckpt"), model.state_dict())


def test_a_base_models_file_with_the_old_names_of_layer_norms_fills_a_model_with_a_head(tmp_path):
    model = build("BertForMaskedLM", LARGE)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    pattern = re.compile("|".join(old))
    state = {
        pattern.sub(lambda match: old[match[0]], key.removeprefix("bert.")): value
        for key, value in model.state_dict().items()
    }
    assert "embeddings.LayerNorm.gamma" in state
    torch.save(state | {"cls.seq_relationship.weight": torch.zeros(2, 32)}, tmp_path / "pytorch_model.bin")
    assert_same(opened(model, tmp_path), model.state_dict())
    del state["encoder.layer.1.output.dense.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="bert.encoder.layer.1.output.dense.weight is missing, and from_pretrained"):
        opened(model, tmp_path)


def test_a_config_alone_is_enough_for_a_plan_and_its_values_can_be_changed(tmp_path, cli, capsys):
    name = "ViTForImageClassification"
    build(name, LARGE).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = ["--pretrained_model", f"transformers:{tmp_path}"]
    student = ["--student", f"transformers:{tmp_path}", "--student_kwargs", *words(SMALL)]
    assert cli(select_main, *named, *student, "--dry_run") is None
    assert capsys.readouterr().out.endswith("38 selected, 2 classifier; nothing written\n")
    message = cli(select_main, *named, *student, "--output_dir", tmp_path / "out")
    assert "no weights in it; there is no such file as model.safetensors, model.safetensors.index.json" in message
    small = names.create_model(f"transformers:{tmp_path}", device="meta", **SMALL)
    assert (type(small).__name__, small.config.hidden_size, small.config.num_hidden_layers) == (name, 16, 2)
    assert {value.device.type for value in small.state_dict().values()} == {"meta"}


def test_a_selection_from_a_directory_of_transformers_says_where_it_comes_from(tmp_path, cli):
    teacher = build("ViTForImageClassification", LARGE)
    directory = save(teacher, tmp_path / "vit")
    command = ["--pretrained_model", f"transformers:{directory}", "--student_kwargs", *words(SMALL)]
    assert cli(select_main, *command, "--output_dir", tmp_path / "out.pth") is None
    student = build("ViTForImageClassification", SMALL)
    assert_same(read(tmp_path / "out.pth"), select_weights(teacher, student))
    assert json.loads((tmp_path / "out.json").read_text())["teacher"] == {
        "name": f"transformers:{directory}",
        "model": "ViTForImageClassification",
        "kwargs": {},
        "source": str(directory),
        "sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
    }


def hub_snapshot(cache, repository, commit="abc"):
    """Where the hub's cache has the files of a repository."""
    directory = cache / f"models--{repository.replace('/', '--')}"
    (directory / "snapshots" / commit).mkdir(parents=True)
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text(commit)
    return directory / "snapshots" / commit


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The directory of the hub's cache, which is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("suffix", ["", "@abc"])
def test_repositories_of_transformers_are_read_from_the_cache_of_the_hub(suffix, hub):
    model, name = build("LlamaForCausalLM", LARGE), f"transformers:org/tiny{suffix}"
    save(model, hub_snapshot(hub, "org/tiny"), "8KB")
    empty = names.create_model(name, device="meta")
    found = names.open_published(name, empty, {}, "--pretrained_model", "", False)
    assert_same(dict(found.weights), model.state_dict())
    assert (found.model, found.source) == ("LlamaForCausalLM", f"org/tiny{suffix}, abc")


# ---------------------------------------------------------------------------------------------------------
# timm's own directories and repositories


@pytest.fixture(scope="module")
def trained():
    return create_model(VIT.teacher, **VIT.large).eval()


def save_timm(model, directory):
    timm.models.save_for_hf(model, directory, model_args={k: v for k, v in VIT.large.items() if k != "num_classes"})


def test_directories_of_timm_give_what_the_module_gives(trained, tmp_path, cli):
    save_timm(trained, tmp_path / "saved")
    expected = select_weights(trained, VIT.student_model())
    assert_same(select_weights(f"local-dir:{tmp_path}/saved", VIT.student_model()), expected)
    small = {"embed_dim": 24, "depth": 2}
    command = ["--pretrained_model", f"local-dir:{tmp_path}/saved", "--student_kwargs", *words(small)]
    assert cli(select_main, *command, "--include_head", "--output_dir", tmp_path / "out.pth") is None
    written = read(tmp_path / "out.pth")  # with the classes that config.json says
    assert_same({key: written[key] for key in expected}, expected)
    assert written.keys() - expected.keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize("scheme", ["", "hf-hub:"])
def test_repositories_of_timm_are_read_from_the_cache_of_the_hub(scheme, trained, hub, tmp_path, cli):
    save_timm(trained, hub_snapshot(hub, "timm/tiny.mine"))
    command = ["--pretrained_model", f"{scheme}timm/tiny.mine", "--student", VIT.student]
    command += ["--student_kwargs", *words(VIT.small), "--output_dir", tmp_path / "out.pth"]
    assert cli(select_main, *command) is None
    assert_same(read(tmp_path / "out.pth"), select_weights(trained, VIT.student_model()))
    record = json.loads((tmp_path / "out.json").read_text())["teacher"]
    assert (record["model"], record["source"]) == ("vit_small_patch16_224", "timm/tiny.mine, abc")


def test_a_name_of_timms_may_be_a_student_and_keeps_its_classes(trained, tmp_path):
    save_timm(trained, tmp_path)
    model = names.create_model(f"local-dir:{tmp_path}", option="--student", device="meta", depth=1)
    assert (model.embed_dim, len(model.blocks), model.num_classes, model.patch_embed.img_size) == (48, 1, 5, (32, 32))


# ---------------------------------------------------------------------------------------------------------
# torchvision


def test_published_weights_of_torchvision_are_named_and_plans_need_none(monkeypatch, tmp_path, cli, capsys):
    name, classes = "squeezenet1_1", ["num_classes=3"]
    command = ["--pretrained_model", f"torchvision:{name}.DEFAULT", "--teacher_kwargs", *classes]
    command += ["--student", f"torchvision:{name}", "--student_kwargs", *classes]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert cli(select_main, *command, "--dry_run") is None
    assert "2 classifier; nothing written" in capsys.readouterr().out

    teacher, weights = torchvision.models.squeezenet1_1(num_classes=3), torchvision.models.SqueezeNet1_1_Weights
    file = tmp_path / "hub" / "checkpoints" / weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(teacher.state_dict(), file)  # as torch.hub keeps it
    assert cli(select_main, *command, "--output_dir", tmp_path / "out.pth") is None
    expected = {key: value for key, value in teacher.state_dict().items() if not key.startswith("classifier.")}
    assert_same(read(tmp_path / "out.pth"), expected)
    assert json.loads((tmp_path / "out.json").read_text())["teacher"] == {
        "name": f"torchvision:{name}.DEFAULT",
        "model": f"{name}.IMAGENET1K_V1",
        "kwargs": {"num_classes": 3},
        "source": weights.DEFAULT.url,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def test_no_weights_of_a_backbone_are_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = names.create_model("torchvision:fcn_resnet50", num_classes=3, device="meta")
    assert model.classifier[-1].out_channels == 3 and not list(tmp_path.iterdir())


def small_densenet():
    return torchvision.models.DenseNet(4, (1, 2), 8, 2, num_classes=3)


def small_vit():
    return torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 24, num_classes=3)


@pytest.mark.parametrize(
    ("build", "pattern", "old"),
    [
        (small_densenet, r"(denselayer\d\.(norm|conv))(\d)", r"\1.\3"),
        (small_vit, r"mlp\.(0|3)", lambda match: f"mlp.linear_{1 + int(match[1]) // 3}"),
    ],
)
def test_old_names_in_torchvisions_files_and_their_old_format_are_read(build, pattern, old, tmp_path):
    model = build()
    state = {re.sub(pattern, old, key): value for key, value in model.state_dict().items()}
    assert state.keys() != model.state_dict().keys()
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    found = names.open_weights(tmp_path / "x.pth", build(), "weights")
    assert_same(dict(found.weights), model.state_dict())
    assert (found.model, found.source, found.unused) == (type(model).__name__, str(tmp_path / "x.pth"), [])


def test_weights_of_any_other_module_are_read_under_its_own_names(tmp_path):
    teacher, student = (nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)) for width in (8, 4))
    torch.save(teacher.state_dict(), tmp_path / "x.pth")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs = {"example_inputs": torch.zeros(1, 4)}
    found = select_weights(empty, student, weights=tmp_path / "x.pth", **inputs)
    assert_same(found, select_weights(teacher, student, **inputs))


# ---------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("transfomers:x", "no such scheme as transfomers:; did you mean transformers:x? there are hf-hub:, local-dir:"),
        ("transformers:", "write a name after transformers:"),
        ("transformers:./nowhere", "no such directory"),
        ("transformers:bad name!", "is no name of the hub's; write ORG/NAME"),
        ("transformers:org/nowhere", "cannot fetch its configuration, config.json of the hub's org/nowhere ("),
        ("hf-hub:org/nowhere", "cannot fetch its configuration, config.json of the hub's org/nowhere ("),
        ("timm/nowhere", "cannot fetch its configuration, config.json of the hub's timm/nowhere ("),
        (
            "vit_tiny_patch16_224.augreg_in21k",
            "model.safetensors of the hub's timm/vit_tiny_patch16_224.augreg_in21k (",
        ),
        ("local-dir:nowhere", "no such directory"),
        ("google/vit", "no such model; write transformers:google/vit, or hf-hub:google/vit of one that timm saved"),
        ("/", "no such model; write transformers:/, or local-dir:/ of one that timm saved"),
        ("torchvision:resnt34", "torchvision has no such model; did you mean resnet34"),
        ("torchvision:resnet34.V9", "resnet34 has no weights V9; it has IMAGENET1K_V1, DEFAULT"),
    ],
)
def test_names_that_cannot_be_used_are_refused_in_one_line(name, named, hub, cli, tmp_path):
    shallow = ["--teacher_kwargs", "depth=1", "--student_kwargs", "depth=1"] if name.startswith("vit") else []
    words = ["--pretrained_model", name, "--student", "vit_tiny", *shallow, "--output_dir", tmp_path / "x.pth"]
    message = cli(select_main, *words)
    assert message.startswith(f"--pretrained_model {name}: ")
    assert named in message
    assert "\n" not in message
    if "fetch" in named:
        assert "HF_HUB_OFFLINE=1" in message


CONFIG = {"architectures": ["BertModel"], "model_type": "bert"}


@pytest.mark.parametrize(
    ("scheme", "content", "named"),
    [
        ("transformers", "{no", "config.json cannot be read (not JSON"),
        ("transformers", "[]", "config.json holds no names with values"),
        ("transformers", CONFIG | {"architectures": ["BertModle"]}, "has no class 'BertModle'"),
        ("transformers", CONFIG | {"architectures": ["pipeline"]}, "has no class 'pipeline'"),
        ("transformers", {"model_type": "brt", "auto_map": {}}, "knows no model_type 'brt'; did you mean"),
        ("transformers", {"model_type": "brt", "auto_map": {}}, "code that a repository brings is never run"),
        ("transformers", {"architecture": "resnet18"}, "write local-dir: or hf-hub: before a model of timm's"),
        ("transformers", CONFIG | {"quantization_config": {"bits": 4}}, "is quantised (quantization_config"),
        ("transformers", CONFIG | {"hidden_size": 33}, "transformers cannot build it: "),
        ("local-dir", CONFIG, "has no architecture of timm's; write transformers: before its name"),
        ("local-dir", {"architecture": "resnt18"}, "no such model; did you mean"),
        (
            "local-dir",
            {"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"checkpoint_path": "x"}},
            "not timm's",
        ),
        ("local-dir", {"architecture": "resnet18", "pretrained_cfg": 3}, "is not timm's"),
    ],
)
def test_configs_that_cannot_be_used_are_refused_in_one_line(scheme, content, named, tmp_path):
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as refusal:
        names.create_model(f"{scheme}:{tmp_path}", option="--student", device="meta")
    assert str(refusal.value).startswith(f"--student {scheme}:{tmp_path}: ")
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"hidden_szie": 16}, "hidden_szie=16: BertConfig has no hidden_szie; did you mean hidden_size"),
        ({"hidden_size.x": 16}, "hidden_size is no config"),
        ({"hidden_size": "wide"}, "hidden_size=wide"),
        ({"hidden_size": 33}, "transformers cannot build it with hidden_size=33: "),
    ],
)
def test_values_that_a_config_cannot_have_are_refused(kwargs, named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError) as refusal:
        names.create_model(f"transformers:{tmp_path}", option="--student", device="meta", **kwargs)
    assert named in str(refusal.value)


@pytest.mark.parametrize("kwargs", [{"weights": "DEFAULT"}, {"num_clases": 3}])
def test_arguments_that_torchvision_does_not_take_are_refused(kwargs):
    with pytest.raises(InputError, match=f"--student torchvision:alexnet: .*{next(iter(kwargs))}"):
        names.create_model("torchvision:alexnet", option="--student", device="meta", **kwargs)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("vit_tiny", "timm"),
        ("hf-hub:x/y", "timm"),
        ("transformers:x/y", "transformers"),
        ("torchvision:x", "torchvision"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_the_command_that_installs_it(name, package, monkeypatch, cli):
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    message = cli(select_main, "--pretrained_model", name, "--student", "vit_tiny", "--dry_run")
    assert message == (
        f"--pretrained_model {name}: the package {package} is not installed; run: pip install "
        f'"weight-selection[{package}]"'
    )
