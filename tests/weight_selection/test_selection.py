"""From a request to weights, from Python and by the command: models, names, files; and on to timm."""

import json

import pytest
import timm
import torch
import torch.distributed
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from helpers import assert_same, meta, prefixed, read, written
from pairs import PAIRS, RESNET, VIT
from weight_selection import select_weights
from weight_selection.cli import main as select_main
from weight_selection.errors import InputError
from weight_selection.options import ELEMENT_SELECTION
from weight_selection.sources.initial_weights import find_weights, load_initial
from weight_selection.sources.timm_models import create_model


@pytest.mark.parametrize("architecture", PAIRS)
def test_a_student_as_large_as_its_teacher_computes_the_same(architecture):
    pair = PAIRS[architecture]
    teacher = create_model(pair.teacher, **pair.large).eval()
    student = create_model(pair.teacher, **pair.large).eval()
    student.load_state_dict(select_weights(teacher, student), strict=False)
    student.head.load_state_dict(teacher.head.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(student(images), teacher(images))


@pytest.mark.parametrize("method", ELEMENT_SELECTION)
def test_selected_weights_are_copies(method):
    # Training the student in place must not change the teacher that distils into it.
    model = create_model(VIT.student, **VIT.small)
    for value in select_weights(model, model, element_selection=method).values():
        value.fill_(7)
    assert not any((value == 7).any() for value in model.state_dict().values())


def test_a_student_can_be_given_by_name():
    chosen = select_weights(create_model("vit_small", num_classes=5), "vit_tiny")
    student = meta("vit_tiny").state_dict()
    assert {key: value.shape for key, value in chosen.items()} == {
        key: value.shape for key, value in student.items() if not key.startswith("head.")
    }


@pytest.mark.parametrize("name", ["vit_small_resnet26d_224", "vit_base_patch16_siglip_224"])
def test_models_that_are_not_all_neurons_are_refused_or_selected_but_never_crash(name):
    # Batch statistics have a counter without any dimension; attention pooling has keys and values stacked.
    teacher = create_model(name, embed_dim=48, depth=1, num_heads=3, num_classes=5)
    student = meta(name, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    try:
        chosen = select_weights(teacher, student)
    except InputError:
        return
    assert {key: value.shape for key, value in chosen.items()} == {
        key: value.shape for key, value in student.state_dict().items() if not key.startswith("head.")
    }


def test_any_architecture_goes_from_a_file_to_a_file_that_initialises(cli, tmp_path, capsys):
    teacher = create_model(RESNET.teacher, **RESNET.large)
    teacher.train()(torch.rand(2, 3, 64, 64))  # moves the running statistics
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    assert cli(select_main, *RESNET.command(tmp_path / "out", tmp_path / "teacher.pth")) is None
    assert written(tmp_path / "out") == ["resnet.json", "resnet.pth"]
    chosen = read(tmp_path / "out" / "resnet.pth")
    assert_same(chosen, select_weights(teacher, RESNET.student_model()))
    key = "layer1.0.bn1.running_mean"
    assert torch.equal(chosen[key], teacher.state_dict()[key][::2])
    assert chosen["layer1.0.bn1.num_batches_tracked"] == 1
    student = RESNET.student_model()
    file = find_weights(tmp_path / "out", student, "--initialize")
    assert load_initial(student, file, "--initialize") == RESNET.head


def test_the_teachers_weights_can_be_given_apart_from_it(weights, files, selected):
    teacher, student = VIT.models()  # on the meta device
    assert_same(select_weights(teacher, student, weights=weights["vit"]), selected["vit"])
    assert_same(select_weights(teacher, student, weights=files["vit"]), selected["vit"])
    assert_same(select_weights(teacher, student, weights=str(files["vit"])), selected["vit"])


def test_a_teacher_can_be_a_name_with_a_file(tmp_path):
    student = {"embed_dim": 32, "num_heads": 2, "num_classes": 5}
    teacher = create_model("test_vit")
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    small = meta("test_vit", **student)
    assert_same(select_weights("test_vit", small, weights=tmp_path / "teacher.pth"), select_weights(teacher, small))


def test_weights_that_are_not_the_teachers_are_refused(weights, files):
    teacher, student = VIT.models()
    with pytest.raises(InputError, match=r"weights: cls_token is absent, \(1, 1, 48\) is needed"):
        select_weights(teacher, student, weights=weights["convnext"])
    with pytest.raises(InputError, match=f"weights={files['convnext']}"):
        select_weights(teacher, student, weights=files["convnext"])
    with pytest.raises(InputError, match="^teacher=nosuch_model: no such model"):
        select_weights("nosuch_model", student)
    with pytest.raises(InputError, match="^weights: cls_token is a ndarray; give tensors with values"):
        select_weights(teacher, student, weights={key: value.numpy() for key, value in weights["vit"].items()})
    with pytest.raises(InputError, match="^weights: cls_token is a tensor on the meta device"):
        select_weights(teacher, student, weights=teacher.state_dict())
    with pytest.raises(InputError, match="^weights={0: .*: give a state_dict"):
        select_weights(teacher, student, weights=dict(enumerate(weights["vit"].values())))


def mlp(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def one_process():
    """A process group of this process alone, which DDP needs."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "compile around DDP": lambda model: compiled(DistributedDataParallel(model)),
    "DDP around compile": lambda model: DistributedDataParallel(compiled(model)),
    "torch's average": AveragedModel,
    "timm's average": timm.utils.ModelEmaV3,
    "timm's average of DDP": lambda model: timm.utils.ModelEmaV3(DistributedDataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_give_and_load_the_weights_of_what_is_in_them(wrap, one_process):
    teacher, plain, student = mlp(8), mlp(4), mlp(4)
    inputs = {"example_inputs": torch.zeros(1, 6)}
    plain.load_state_dict(select_weights(teacher, plain, **inputs))
    wrapped = WRAPPERS[wrap](student)
    found = wrapped.load_state_dict(select_weights(WRAPPERS[wrap](teacher), wrapped, **inputs), strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"n_averaged"}
    state = wrapped.state_dict()
    assert all(
        torch.equal(state[next(name for name in state if name.endswith(key))], plain.state_dict()[key])
        for key in plain.state_dict()
    )


@pytest.mark.parametrize("prefix", ["module.", "model.", "net._orig_mod."])
@pytest.mark.parametrize("nest", [dict, lambda weights: {"state_dict": weights, "epoch": 3}], ids=["bare", "nested"])
def test_weights_in_memory_may_be_nested_and_have_prefixes_as_those_in_files(prefix, nest):
    teacher, student, inputs = mlp(8), mlp(4), {"example_inputs": torch.zeros(1, 6)}
    weights = nest(prefixed(prefix, teacher.state_dict()))
    assert_same(select_weights(mlp(8), student, weights=weights, **inputs), select_weights(teacher, student, **inputs))


def test_weights_without_a_tensor_are_refused():
    with pytest.raises(InputError, match=r"weights: 0.weight is absent, \(8, 6\) is needed"):
        select_weights(mlp(8), mlp(4), weights={}, example_inputs=torch.zeros(1, 6))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_loads_the_file_into_a_model_of_other_classes(suffix, cli, files, selected, tmp_path):
    path = tmp_path / f"init{suffix}"
    assert cli(select_main, *VIT.command(path, files["vit"])) is None
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **VIT.small
    )
    state = model.state_dict()
    assert_same({key: state[key] for key in selected["vit"]}, selected["vit"])


def test_timm_loads_a_complete_file_as_a_checkpoint(cli, files, selected, tmp_path):
    command = VIT.command(tmp_path / "init.safetensors", files["vit"], "--complete", "--seed", "3")
    assert cli(select_main, *command) is None
    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "init.safetensors"), **VIT.small)
    torch.manual_seed(3)
    expected = create_model("vit_tiny", **VIT.small).state_dict() | selected["vit"]
    assert_same(dict(model.state_dict()), dict(expected))
    record = json.loads((tmp_path / "init.json").read_text())
    assert (record["left_out"], record["random"]) == ([], VIT.head)
    assert load_initial(model, tmp_path / "init.safetensors", "--initialize") == []
