"""Models by name. A scheme before the name says whose model it is; without one it is the paper's or timm's.

    vit_tiny, vit_small_patch16_224.augreg_in21k      the paper's and timm's
    hf-hub:ORG/NAME, timm/NAME, local-dir:DIR         timm's, in a repository of the hub or a directory on disk
    transformers:ORG/NAME, transformers:DIR           Hugging Face's
    torchvision:NAME, torchvision:NAME.WEIGHTS        torchvision's

Each library has a module that creates models by name and opens their weights. It is imported when a name or a model of
the library is met. This one imports no torch: names are checked before torch is imported.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from weight_selection.errors import InputError
from weight_selection.files import StrPath
from weight_selection.sources.directories import Directory, read_config
from weight_selection.sources.hub import Repository

if TYPE_CHECKING:
    import torch

    from weight_selection.sources.teachers import Opened

TIMM = ("hf-hub", "local-dir")  # timm's own schemes
SCHEMES = dict.fromkeys(TIMM, "timm") | {"transformers": "transformers", "torchvision": "torchvision"}
TIMMS_ORGANISATION = "timm/"  # of the hub


def split_name(name: str) -> tuple:
    """(scheme, the rest) of a name; the scheme of timm's and the paper's own names is empty."""
    if name.startswith(TIMMS_ORGANISATION):
        return "hf-hub", name
    scheme, colon, rest = name.partition(":")
    return (scheme, rest) if colon else ("", name)


def check_name(name: str, option: str, schemes: tuple = tuple(SCHEMES)) -> None:
    """Refuse at once what is wrong with a name, before torch is imported and without a look at the network.

    Args:
        option: what gave the name, for errors.
        schemes: those that can be used there.

    Raises:
        InputError: an unknown scheme, a library that is not installed, or a directory that is not there.
    """
    scheme, rest = split_name(name)
    if scheme not in ("", *schemes):
        near = difflib.get_close_matches(scheme, schemes, 1)
        hint = f"did you mean {near[0]}:{rest}? " if near else ""
        known = ", ".join(f"{known}:" for known in schemes)
        raise InputError(f"{option} {name}: no such scheme as {scheme}:; {hint}there are {known}, and timm/NAME")
    if scheme and not rest:
        raise InputError(f"{option} {name}: write a name after {scheme}:")
    package = SCHEMES.get(scheme, "timm")
    if find_spec(package) is None:
        raise InputError(
            f'{option} {name}: the package {package} is not installed; run: pip install "weight-selection[{package}]"'
        )
    place = place_of(name, option)
    if isinstance(place, Directory):
        read_config(place)


def place_of(name: str, option: str, remedy: str = "name a directory") -> Directory | Repository | None:
    """Where the files of a model are that a name stands for; None if its library knows the name.

    Raises:
        InputError: the name is a path at which there is no directory.
    """
    scheme, rest = split_name(name)
    where = f"{option} {name}"
    if scheme == "hf-hub":
        return Repository(rest, where, remedy)
    if scheme not in ("local-dir", "transformers"):
        return None
    if Path(rest).is_dir():
        return Directory(Path(rest), where)
    if scheme == "local-dir" or rest.startswith((".", "/", "~")) or rest.count("/") > 1:
        raise InputError(f"{where}: no such directory; name one that a library saved a model in")
    return Repository(rest, where, f"it is no directory either; {remedy}")


def create_model(
    name: str, *, option: str = "--model", device: str | torch.device = "cpu", **kwargs
) -> torch.nn.Module:
    """Build a model by its name with its random initialisation.

    Args:
        name: of any scheme.
        option: what gave the name, for errors.
        device: where to create it; ``"meta"`` gives shapes without memory.
        **kwargs: the model's arguments: of timm's classes, of a Hugging Face config, of torchvision's builders.

    Raises:
        InputError: as ``check_name``, or the library does not know the name or an argument.
    """
    check_name(name, option)
    return _by_name(name).create_model(name, option=option, device=device, **kwargs)


def arguments_of(name: str, kwargs: dict, option: str) -> dict:
    """{argument: value} of all arguments that ``create_model`` builds a model with; a config inside is a dict.

    Args, Raises: as ``create_model``.
    """
    check_name(name, option)
    return _by_name(name).arguments_of(name, kwargs, option)


def open_published(
    name: str, model: torch.nn.Module, kwargs: dict, option: str, remedy: str, include_head: bool
) -> Opened:
    """The weights that belong to a name.

    Args:
        name, kwargs, option: as of ``create_model``.
        model: what that created, perhaps on the meta device.
        remedy: what the user can do if the weights cannot be had, for errors.
        include_head: the classifier is wanted.

    Raises:
        InputError: there are none, they cannot be fetched, or they do not fit the model.
    """
    return _by_name(name).open_published(name, model, kwargs, option, remedy, include_head)


def open_weights(path: StrPath, model: torch.nn.Module, option: str) -> Opened:
    """The weights in a file or directory for a model, named as its library names them.

    Args:
        path: the file or directory.
        model: a module, perhaps on the meta device.
        option: what named the path, for errors.

    Raises:
        InputError: they cannot be read, or they do not fit the model.
    """
    return _by_model(model).open_weights(path, model, option)


def _by_name(name):
    package = SCHEMES.get(split_name(name)[0], "timm")
    return import_module(f"weight_selection.sources.{package}_names")


def _by_model(model):
    """The module of the library that a model's class comes from; of other classes' models that of files."""
    from weight_selection.sources.facts import library_of

    package = library_of(model)
    return import_module(f"weight_selection.sources.{f'{package}_names' if package else 'teachers'}")
