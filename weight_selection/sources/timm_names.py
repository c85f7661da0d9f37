"""timm's models by name, and the weights that are published under it."""

import re
from pathlib import Path

import torch.nn as nn

from weight_selection.errors import InputError, first_line
from weight_selection.files import StrPath
from weight_selection.sources.architectures import NO_KEYS
from weight_selection.sources.directories import Directory, files_of, weight_files
from weight_selection.sources.hub import Repository, fetch
from weight_selection.sources.names import TIMM, check_name
from weight_selection.sources.teachers import Opened, classifier_of, open_weights, stored_under_own_names
from weight_selection.sources.timm_models import arguments_of, create_model, model_facts
from weight_selection.sources.weight_files import Weights, stored_in, training_options

__all__ = ["arguments_of", "create_model", "create_pretrained", "model_of_checkpoint", "open_published", "open_weights"]


def create_pretrained(name: str, kwargs: dict, option: str, remedy: str) -> nn.Module:
    """A model with its published weights, from the hub, its local cache or a directory.

    ``option`` named it, and ``remedy`` is what the user can do if the weights cannot be had, both for errors.

    Raises:
        InputError: there are none, or they cannot be fetched.
    """
    _fetch(name, create_model(name, option=option, **{**kwargs, "device": "meta"}).pretrained_cfg, option, remedy)
    try:
        return create_model(name, option=option, pretrained=True, **kwargs)
    except OSError as error:  # what requests, urllib and huggingface_hub raise without a network or such a file
        raise InputError(f"{option} {name}: cannot fetch its weights ({first_line(error)}); {remedy}") from error


def open_published(name: str, model: nn.Module, kwargs: dict, option: str, remedy: str, include_head: bool) -> Opened:
    """The published weights of a model, read tensor by tensor if the file has them under timm's names.

    Args, Raises: as ``names.open_published``.
    """
    cfg = model.pretrained_cfg
    if include_head and model.num_classes != cfg["num_classes"]:  # timm drops the published one
        raise InputError(
            f"--include_head: the published classifier has {cfg['num_classes']} classes; leave num_classes out of "
            "--teacher_kwargs"
        )
    files = _fetch(name, cfg, option, remedy)
    stored = files and stored_under_own_names(files, model, f"{option} {name}:")
    weights = Weights(stored) if stored else create_pretrained(name, kwargs, option, remedy).state_dict()
    if cfg.get("source") == "local-dir":
        return Opened(weights, cfg["architecture"], cfg["file"], files, [])
    if cfg.get("source") == "hf-hub":
        return Opened(weights, cfg["architecture"], f"{cfg['hf_hub_id']}, {files[0].parent.name}", files, [])
    tagged = ".".join(filter(None, (cfg["architecture"], cfg.get("tag"))))
    return Opened(weights, tagged, cfg.get("hf_hub_id") or cfg.get("url"), files, [])


def model_of_checkpoint(path: StrPath, option: str) -> tuple:
    """The model that main.py trained: (its name, its arguments, the side of its input in pixels).

    Args:
        path: a checkpoint of main.py, or the output directory of a run.
        option: what named it, for errors.

    Raises:
        InputError: it is no such checkpoint.
    """
    options = training_options(path, option)
    name, kwargs, size = (options.get(key) for key in ("model", "model_kwargs", "input_size"))
    if not (isinstance(name, str) and isinstance(kwargs, dict) and isinstance(size, int)):
        raise InputError(f"{option} {path}: does not say what model its weights are of; name the teacher too")
    check_name(name, option, TIMM)
    model = create_model(name, option=option, input_size=size, device="meta", **kwargs)
    head_norm = model_facts(model).architecture.head_norm or NO_KEYS
    stored = stored_in(files_of(path, option), option)
    classifier = [
        value for key, value in stored.items() if re.search(classifier_of(model), key) and not re.search(head_norm, key)
    ]
    if classifier:  # --nb_classes may be left out, as the data set knows it
        kwargs = {"num_classes": classifier[-1].shape[0], **kwargs}
    return name, kwargs, size


def _fetch(name: str, cfg: dict, option: str, remedy: str) -> list:
    """The files of the published weights, fetched if need be; none of weights that timm itself gets from an address.

    Args:
        cfg: timm's configuration of the model.
    """
    where = f"{option} {name}"
    if cfg.get("source") == "local-dir":
        return weight_files(Directory(Path(cfg["file"]), where))
    if cfg.get("source") == "hf-hub":
        return weight_files(Repository(cfg["hf_hub_id"], where, remedy))
    if not cfg.get("tag") or not (cfg.get("hf_hub_id") or cfg.get("url")):
        raise InputError(f"{where}: timm has no weights for it; {remedy}")
    if not cfg.get("hf_hub_id"):
        return [fetch(cfg["url"], where, remedy)]
    repository = Repository(cfg["hf_hub_id"], where, remedy)
    names = [name for name in (cfg.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin") if name]
    for look in repository.known, repository.file:
        for name in names:
            if path := look(name):
                return [path]
    return []
