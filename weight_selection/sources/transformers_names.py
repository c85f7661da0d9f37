"""Hugging Face's models by name: a repository of the hub or a directory with its config.json, and weights beside it.

A config.json alone is enough for a plan. Code that a repository brings is never run. Keys of files are renamed as
``from_pretrained`` of the installed version renames them; where it changes tensors too, it is called itself.
"""

import copy
import difflib
import re
from collections.abc import Callable

import torch
import torch.nn as nn
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from weight_selection.errors import InputError
from weight_selection.files import StrPath
from weight_selection.sources import teachers
from weight_selection.sources.directories import Directory, files_of, read_config, weight_files
from weight_selection.sources.names import place_of
from weight_selection.sources.teachers import Opened, classifier_of, mismatch, refuse_quantised
from weight_selection.sources.weight_files import Weights, stored_in, without_common_prefix
from weight_selection.tied import tied_keys

NOT_SIZES = {"architectures", "auto_map", "model_type", "transformers_version", "quantization_config"}
CONVERTED = object()  # in place of a key: from_pretrained changes the tensor


# ---------------------------------------------------------------------------------------------------------
# Models


def create_model(name: str, *, option: str = "--model", device: str | torch.device = "cpu", **kwargs) -> nn.Module:
    """A model of the class that its config.json names, or of AutoModel's; as ``names.create_model``.

    Args:
        **kwargs: values of the config; those of a config inside it as ``vision_config.hidden_size``.
    """
    place = place_of(name, option)
    config, cls = _config(read_config(place), kwargs, place.where)
    try:
        with torch.device(device):
            return cls(config) if cls else transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # it assumes that a config is sensible, and fails in its own ways if it is not
        raise InputError(f"{place.where}: transformers cannot build it{_given(kwargs)}: {_reason(error)}") from error


def arguments_of(name: str, kwargs: dict, option: str) -> dict:
    """The values of a model's config; as ``names.arguments_of``."""
    place = place_of(name, option)
    return _config(read_config(place), kwargs, place.where)[0].to_dict()


def _config(content: dict, kwargs: dict, where: str) -> tuple:
    """The config that a config.json with changed values says, and the class of the model; None for AutoModel's."""
    if content.get("quantization_config"):
        raise InputError(f"{where}: is quantised (quantization_config in config.json); name the original model")
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), 3) if isinstance(kind, str) else []
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        code = "; code that a repository brings is never run" if "auto_map" in content else ""
        timms = "; write local-dir: or hf-hub: before a model of timm's" if "architecture" in content else ""
        raise InputError(
            f"{where}: transformers {transformers.__version__} knows no model_type {kind!r:.80}{hint}{code}{timms}"
        )
    cls = _class(content.get("architectures"), where)
    try:
        content = _without_implementations(content)
        config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(content))
        for key, value in sorted(kwargs.items(), key=lambda item: item[0].endswith("layer_types")):
            _set(content, config, key.split("."), value, f"{where}: {key}={value}")
        return CONFIG_MAPPING[kind].from_dict(content), cls
    except InputError:
        raise
    except Exception as error:  # checks of configs have errors of their own
        raise InputError(f"{where}: transformers cannot read its config{_given(kwargs)}: {_reason(error)}") from error


def _without_implementations(content):
    """A copy of a config.json that does not choose implementations of attention: some are code of the hub's."""
    if not isinstance(content, dict):
        return copy.deepcopy(content)
    return {key: _without_implementations(v) for key, v in content.items() if "_implementation" not in str(key)}


def _class(architectures, where: str):
    """The class of the model that was saved; None if the config does not say."""
    if not architectures:
        return None
    name = architectures[0] if isinstance(architectures, list) else architectures
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise InputError(
            f"{where}: transformers {transformers.__version__} has no class {name!r:.80}, which config.json names "
            "(architectures); install the version that saved it; code that a repository brings is never run"
        )
    return cls


def _set(content: dict, config, path: list, value, what: str) -> None:
    """Change a value of a config.json, ``config`` being what it says now; a path of names leads into inner configs."""
    known = {*config.to_dict(), *config.attribute_map, "num_labels"} - NOT_SIZES
    name, *inner = path
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(known))}"
        raise InputError(f"{what}: {type(config).__name__} has no {name}; {hint}")
    if inner:
        if not isinstance(getattr(config, name), transformers.PretrainedConfig):
            raise InputError(f"{what}: {name} is no config; leave out what is behind it")
        _set(content.setdefault(name, {}), getattr(config, name), inner, value, what)
        return
    if name == "num_labels":  # it is the number of these two
        content.pop("id2label", None), content.pop("label2id", None)
    types = content.get("layer_types")
    if name == "num_hidden_layers" and isinstance(types, list) and isinstance(value, int):
        content["layer_types"] = types[:value]  # one for each layer
    content[config.attribute_map.get(name, name)] = value


def _given(kwargs):
    return f" with {' '.join(f'{key}={value}' for key, value in kwargs.items())}" if kwargs else ""


def _reason(error):
    return f"{str(error) or type(error).__name__:.300}".strip().replace("\n", " ")


# ---------------------------------------------------------------------------------------------------------
# Weights


def open_published(name: str, model: nn.Module, kwargs: dict, option: str, remedy: str, include_head: bool) -> Opened:
    """The weights beside the config.json; as ``names.open_published``."""
    place = place_of(name, option, remedy)
    files = weight_files(place)
    weights, unused = _open(files, model, place.where)
    source = str(place.path) if isinstance(place, Directory) else f"{place.name}, {files[0].parent.name}"
    return Opened(weights, type(model).__name__, source, files, unused)


def open_weights(path: StrPath, model: nn.Module, option: str) -> Opened:
    """The weights of a file or directory that ``save_pretrained`` could have written; as ``names.open_weights``."""
    if not isinstance(model, transformers.PreTrainedModel):  # a part of one
        return teachers.open_weights(path, model, option)
    files = files_of(path, option)
    weights, unused = _open(files, model, f"{option} {path}")
    return Opened(weights, type(model).__name__, str(path), files, unused)


def _open(files: list, model: nn.Module, where: str) -> tuple:
    """({the model's key: tensor}, the files' names of all else). A tensor is read when it is asked for, if possible."""
    stored = stored_in(files, where)
    rename, expected = _renaming(model), model.state_dict()
    if not any(rename(key) in expected for key in stored):
        stored = without_common_prefix(stored)
    renamed = {key: rename(key) for key in stored}
    if CONVERTED in renamed.values():
        refuse_quantised(stored, model, where)
        return _converted({key: value.read() for key, value in stored.items()}, model, where)
    found = {renamed[key]: value for key, value in stored.items() if renamed[key] in expected}
    found = _with_tied(found, model)
    refuse_quantised(found, model, where)
    _check(found, model, where)
    return Weights(found), [key for key in stored if renamed[key] not in expected]


def _renaming(model: nn.Module) -> Callable:
    """A function from a file's key to the model's; ``CONVERTED`` if from_pretrained would change the tensor."""
    expected, prefix = model.state_dict(), model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4 has no table of names
        return lambda key: _bridged(_without_old_names(key, expected), prefix, expected)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(key):
        renamed, converter = rename_source_key(key, renamings, converters, prefix, expected)
        if converter is not None:
            return CONVERTED
        return renamed if renamed in expected or key not in expected else key

    return rename


def _without_old_names(key, expected):
    """A key with today's names of a LayerNorm's tensors."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if key.endswith(old) and key not in expected:
            return key.removesuffix(old) + new
    return key


def _bridged(key, prefix, expected):
    """A key with or without the base model's prefix, whichever the model has."""
    return next((k for k in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")) if k in expected), key)


def _with_tied(found, model):
    """Add what files leave out because the model holds the same tensor under another name too."""
    tied = tied_keys(model)
    of_tensor = {tied.get(key, key): value for key, value in reversed(found.items())}  # by the key that it goes by
    absent = (key for key in model.state_dict() if key not in found and tied.get(key, key) in of_tensor)
    return found | {key: of_tensor[tied.get(key, key)] for key in absent}


def _check(found, model, where):
    """Refuse weights that lack a tensor, or have one of another shape; a classifier may do both."""
    pattern = classifier_of(model)
    for key in model.state_dict():
        if key not in found and not re.search(pattern, key):
            raise InputError(
                f"{where}: {key} is missing, and from_pretrained would draw it at random; give weights of a whole "
                f"{type(model).__name__}"
            )
    if problem := mismatch(found, model):
        raise InputError(f"{where}: not the weights of this teacher: {problem}; name another or set its kwargs")


def _converted(state_dict, model, where):
    """As ``_open``, by from_pretrained itself: some tensors of the files are split or joined."""
    dtypes = {value.dtype for value in state_dict.values() if value.is_floating_point()}
    try:
        whole, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state_dict,
            torch_dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=False,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{where}: from_pretrained cannot convert it for this model: {_reason(error)}") from error
    loaded = {key: value for key, value in whole.state_dict().items() if key not in report["missing_keys"]}
    found = _with_tied(loaded, whole)
    _check(found, model, where)
    return found, sorted(report["unexpected_keys"])
