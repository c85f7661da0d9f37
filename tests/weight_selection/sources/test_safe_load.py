"""Files from strangers: whatever is in them, a reader gives what they say or refuses them in one line."""

import codecs
import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import main
from distributed.program import RunError, run_program
from helpers import jax_names, random_weights, read_checkpoint, save_torchscript
from training import metric_log
from training.options import read_config
from weight_selection.errors import InputError
from weight_selection.sources.initial_weights import load_initial
from weight_selection.sources.teachers import read_teacher
from weight_selection.sources.timm_models import create_model
from weight_selection.sources.weight_files import read_weights

TINY = {"embed_dim": 12, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 16, "num_classes": 3}


def tiny():
    torch.manual_seed(0)
    return create_model("vit_tiny", **TINY)


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Forged headers. The high-water mark of this process's memory tells what was taken.


def saved(value, path, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(value):
    """A file of torch.save whose pickle is replaced by that of anything."""
    torch.save({"a": torch.zeros(1)}, file := io.BytesIO())
    with zipfile.ZipFile(file) as old, zipfile.ZipFile("forged.pth", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, pickle.dumps(value, 2) if entry.filename.endswith("data.pkl") else content)
    return "forged.pth"


def renamed(old, new):
    """A file of torch.save with one record under another name, and a harmless one under its own."""
    source = pickled(Call(bytearray, 1 << 30))
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile("renamed.pth", "w") as forged:
        for entry in archive.infolist():
            forged.writestr(entry.filename.replace(old, new), archive.read(entry))
        if old.lower() == new.lower():
            forged.writestr(f"archive/{old}", pickle.dumps({}, 2))
    return "renamed.pth"


def without_numbers():
    """A file of the old format that ends before its numbers, and says that there are none to come."""
    torch.save({"a": torch.zeros(1 << 16)}, file := io.BytesIO(), _use_new_zipfile_serialization=False)
    content = file.getvalue()
    Path("legacy.pth").write_bytes(content[: content.rindex(b"\x80\x02]")] + pickle.dumps([], 2))
    return "legacy.pth"


def nested(depth):
    return of_operations(b"\x80\x02}" + b"N" + b"\x85" * depth + b"K\x01s.")


def copied(how):
    """One dict, which operations copy into 500 others."""
    entries = b"".join(b"X\x05\x00\x00\x00%05dN" % number for number in range(20_000))
    return of_operations(b"\x80\x02}(" + entries + b"uq\x00](" + how * 500 + b"e.")


def of_operations(content):
    with zipfile.ZipFile(pickled({})) as old, zipfile.ZipFile("nested.pth", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else old.read(entry))
    return "nested.pth"


def torchscript_of(content):
    with zipfile.ZipFile("forged.pt", "w") as archive:
        archive.writestr("forged/constants.pkl", b"\x80\x02).")
        archive.writestr("forged/data.pkl", content)
    return "forged.pt"


def encoded(times):
    value = "x" * 100
    for _ in range(times):
        value = Call(codecs.encode, value, "hex")
    return {"a": value}


def claims(**changes):
    """A tensor in a file that says other sizes of it than it has numbers."""
    values = {"size": (4,), "stride": (1,)} | changes
    tensor = torch.zeros(4)
    return saved({"a": torch.as_strided(tensor, values["size"], values["stride"])}, "claims.pth")


def zipped(name, content, suffix):
    with zipfile.ZipFile(f"bomb{suffix}", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return f"bomb{suffix}"


def forged_npz():
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000,), }"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + bytes(64)
    with zipfile.ZipFile("forged.npz", "w") as archive:
        archive.writestr("head/bias.npy", array)
        archive.writestr("embedding/kernel.npy", array)
    return "forged.npz"


def forged_safetensors():
    header = json.dumps({"a": {"dtype": "F32", "shape": [4_000_000_000], "data_offsets": [0, 16_000_000_000]}}).encode()
    Path("forged.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    return "forged.safetensors"


BOMBS = {
    "code": lambda: pickled(Call(os.system, "touch ran")),
    "code, legacy": lambda: Path("forged.pth").write_bytes(pickle.dumps(Call(os.system, "touch ran"))) and "forged.pth",
    "evaluated": lambda: pickled(Call(eval, "open('ran', 'w')")),
    "bytearray": lambda: pickled(Call(bytearray, 20 << 30)),
    "a tensor made from its size": lambda: pickled({"a": Call(torch.Tensor, 20, 1 << 28)}),
    "a storage made from its size": lambda: pickled({"a": Call(torch.storage.UntypedStorage, 1 << 31)}),
    "code in capitals": lambda: renamed("data.pkl", "DATA.PKL"),
    "encoded over and over": lambda: pickled(encoded(25)),
    "old format without its numbers": without_numbers,
    "nested": lambda: nested(1_000_000),
    "one dict, copied": lambda: copied(b"ccollections\nOrderedDict\nh\x00\x85R"),
    "one dict, copied by a class remembered": lambda: copied(
        b"ccollections\nOrderedDict\nq\x01h\x00\x85Rh\x01h\x00\x85R"
    ),
    "one dict, copied into attributes": lambda: copied(b"ccollections\nOrderedDict\n)Rh\x00b"),
    "TorchScript that remembers": lambda: torchscript_of(b"\x80\x02Nr\x00\x00\x00\x08."),
    "one number, repeated": lambda: claims(size=(1 << 40,), stride=(0,)),
    "on no device": lambda: saved({"a": torch.empty(1 << 40, device="meta")}, "meta.pth"),
    "sparse": lambda: saved({"a": torch.sparse_coo_tensor(size=(1 << 20, 1 << 20))}, "sparse.pth"),
    "zip bomb": lambda: zipped("archive/data.pkl", bytes(1 << 28), ".pth"),
    "zip bomb of arrays": lambda: zipped("head/bias.npy", bytes(1 << 28), ".npz"),
    "array": forged_npz,
    "safetensors": forged_safetensors,
    "safetensors header": lambda: Path("h.safetensors").write_bytes(struct.pack("<Q", 1 << 62)) and "h.safetensors",
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("bomb", BOMBS)
def test_forged_file_runs_no_code_and_takes_no_memory(bomb):
    path = BOMBS[bomb]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        read_teacher(path, tiny(), "--pretrained_path")
    assert str(refused.value).startswith(f"--pretrained_path {path}: ")
    assert "\n" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "KiB"
    assert not Path("ran").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_honest_people_are_read(legacy):
    weights = OrderedDict(a=torch.ones(2, 3), b=torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)))
    weights["view"] = torch.arange(10.0)[2:7]
    content = {"model": weights, "args": Namespace(lr=0.1), "epoch": 3, "names": {"x"}, "shape": torch.Size([2])}
    content |= {"dtype": torch.float16, "device": torch.device("cpu")}
    read = read_weights(saved(content, "honest.pth", legacy), "--finetune")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: [[1]]", "lr must be a word"),
        ("model_kwargs: {a: {b: 1}}", "model_kwargs must be a word"),
        ("&a [*a, *a]", "recursive"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nlr: [*c, *c]", "a is not an option"),
        ("lr: &a [*a]", "recursive"),
        ("base: [[x]]", "base must be a file or a list of files"),
        ("lr: !!python/object/apply:os.system [touch ran]", "lr must be|not YAML|--lr"),
        ("[" * 5000, "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_forged_config_is_refused(tiny_run, text, says):
    Path("config.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        main.main([*tiny_run, "--config", "config.yaml"])
    assert not Path("ran").exists()


@pytest.fixture(scope="module")
def half(train, tmp_path_factory):
    """Directory of a run of two epochs, as it was after the first."""
    directory = tmp_path_factory.mktemp("half")
    train(f"--save_ckpt_num 2 --output_dir {directory}")
    for name in ("checkpoint-1.pth", "results.json"):
        (directory / name).unlink()
    return directory


@pytest.mark.parametrize("content", [b"[" * 100_000, b'["epoch"]', b"\xff\xfe", b"1" * 5000, b"null", b""])
@pytest.mark.parametrize("name", ["args.json", "log.txt", "init.json"])
def test_forged_json_is_refused(train, half, name, content):
    if name == "init.json":
        saved(tiny().state_dict(), "init.pth")
        Path(name).write_bytes(content)
        with pytest.raises(InputError, match=r"init.json beside it is not weight_selection.py's"):
            load_initial(tiny(), Path("init.pth"), "--initialize")
        return
    if name == "log.txt" and content == b"":
        return
    shutil.copytree(half, "run")
    (Path("run") / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.* damaged"):
        train("--save_ckpt_num 2 --output_dir run")


def test_message_shows_no_control_characters(capsys):

    def program():
        raise InputError("--config \x1b[2Jx\ny: no")

    with pytest.raises(SystemExit):
        run_program("main.py", program)
    assert capsys.readouterr().err == "main.py: error: --config ?[2Jx y: no\n"


# ---------------------------------------------------------------------------------------------------------
# Mutated files


def mutate(data, content):
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(("set", "cut", "insert", "copy")))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        if what == "set":
            content[place : place + len(piece)] = piece
        elif what == "insert":
            content[place:place] = piece
        elif what == "copy":
            content[place:place] = content[: data.draw(st.integers(1, 64))]
        elif place:
            del content[place:]
    return bytes(content)


def _files():
    weights = random_weights(tiny())
    torch.save({"model": weights, "args": Namespace(lr=1)}, zipped_file := io.BytesIO())
    torch.save(weights, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
    np.savez(npz := io.BytesIO(), **jax_names(weights, 3))
    return {
        "zip.pth": zipped_file.getvalue(),
        "legacy.pth": legacy.getvalue(),
        "w.safetensors": safetensors.torch.save(weights),
        "w.npz": npz.getvalue(),
    }


FILES, MODEL = _files(), tiny()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_weights_are_read_or_refused(name, data):
    Path(name).write_bytes(mutate(data, FILES[name]))
    try:
        weights, _ = read_teacher(Path(name), MODEL, "--pretrained_path")
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert weights.keys() <= MODEL.state_dict().keys()


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_torchscript_is_read_or_refused(data, torchscript):
    Path("clip.pt").write_bytes(mutate(data, torchscript))
    try:
        read_weights("clip.pt", "--pretrained_path")
    except InputError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    path = tmp_path_factory.mktemp("torchscript") / "clip.pt"
    save_torchscript({"visual.proj": torch.ones(3, 4), "logit_scale": torch.tensor(1.0)}, path)
    return path.read_bytes()


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_config_is_read_or_refused(data):
    text = b"base: other.yaml\nlr: 1e-3\nmodel_kwargs:\n  embed_dim: 96\nopt_betas: [0.9, 0.95]\n"
    Path("other.yaml").write_text("epochs: 3\n")
    Path("config.yaml").write_bytes(mutate(data, text))
    try:
        words = read_config("config.yaml")
    except InputError:
        return
    assert all(isinstance(word, str) for word in words)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_log_is_read_or_refused(data):
    rows = "".join(json.dumps({"epoch": epoch, "train_loss": 1 / (epoch + 1)}) + "\n" for epoch in range(3))
    Path("log.txt").write_bytes(mutate(data, rows.encode()))
    try:
        read = metric_log.read_log(Path("log.txt"))
    except InputError:
        return
    assert all(type(row["epoch"]) is int for row in read)


# ---------------------------------------------------------------------------------------------------------
# Checkpoints that are whole, but of nobody's making


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.just({"x": [1]}),
    st.just(torch.zeros(3)),
    st.just(torch.zeros(1, dtype=torch.complex64)),
    st.just(torch.zeros(()).expand(10**9)),
    st.just(torch.zeros(2, 2).to_sparse()),
)


def places(value, where=()):
    yield where
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*where, key))
    elif isinstance(value, list):
        for number in range(min(2, len(value))):
            yield from places(value[number], (*where, number))


@pytest.fixture(scope="module")
def short(train, image_folder, tmp_path_factory):
    """Train with further options for two epochs, each one step on four images."""
    images = tmp_path_factory.mktemp("short") / "images"
    shutil.copytree(image_folder, images, ignore=shutil.ignore_patterns("[4-9].png", "??.png"))
    model = "--model_kwargs embed_dim=32 depth=1 num_heads=2 patch_size=4 --model_ema true"
    return partial(train, f"{model} --batch_size 4 --data_path {images}")


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    short("--output_dir", directory)
    return read_checkpoint(directory, 0)


@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],
    max_examples=60,
)
def test_checkpoint_with_an_odd_value_anywhere_goes_on_or_is_refused(short, whole, data):
    every = list(places(whole))
    weights = [where for where in every if where and where[0] in ("model", "model_ema", "optimizer")]
    others = [where for where in every if where and where[0] not in ("model", "model_ema", "optimizer")]
    *above, last = data.draw(st.sampled_from(data.draw(st.sampled_from((weights, others)))))
    content = inside = whole.copy()
    for key in above:
        inside[key] = inside[key].copy()
        inside = inside[key]
    if data.draw(st.booleans()):
        inside[last] = data.draw(ODD)
    elif isinstance(inside, dict):
        del inside[last]
    saved(content, "odd.pth")
    try:
        short("--resume odd.pth")
    except (InputError, RunError) as error:
        assert "\n" not in str(error)
