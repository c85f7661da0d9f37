"""A student of the teacher's own architecture, with a part of its width and of its depth: ``--width 1/2 --depth 1/2``.

Libraries build a model from arguments: timm from those of a class, Hugging Face from a configuration. The tables below
say which of these are widths, numbers of heads and depths. Widths and heads are multiplied by the same number, so a
head keeps its size.
"""

import math
from fractions import Fraction

from weight_selection.errors import InputError

# fmt: off
WIDTHS = {
    "embed_dim", "embed_dims", "dim", "dims", "base_dim", "inner_dim", "hidden_dim", "partial_dim", "channels",
    "widths", "width_list", "init_channels", "initial_chs", "final_chs", "growth_rate", "growth_rates", "d_model",
    "d_ff", "n_embd", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_size", "hidden_sizes",
    "intermediate_size", "moe_intermediate_size",
}
ENDS = {"stem_width", "stem_chs", "stem_hidden_dim", "head_widths"}  # scaled with other widths, never alone
HEADS = {
    "num_heads", "heads", "num_heads_inner", "num_heads_outer", "attn_pool_num_heads", "num_attention_heads",
    "encoder_attention_heads", "decoder_attention_heads", "n_head", "n_heads",
}
KEY_VALUE_HEADS = {"num_kv_heads", "num_key_value_heads"}  # a single one serves any number of heads
PER_HEAD = {"local_up_to_layer": "embed_dim"}  # what only ConViT has: its embed_dim is the size of a head
WIDTH_FACTORS = {"channel_multiplier", "width_factor", "width_mult", "width", "model_width"}
DEPTHS = {
    "depth", "depths", "depth_list", "layers", "stages", "num_blocks", "num_blocks_list", "block_config",
    "serial_depths", "transformer_depths", "num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers",
    "decoder_layers", "n_layer", "n_layers",
}
DEPTH_FACTORS = {"depth_multiplier", "depth_mult"}
# fmt: on


def smaller_arguments(arguments: dict, width: Fraction | None, depth: Fraction | None) -> dict:
    """Those of a model's arguments that differ in a student with a part of its width, its depth or both.

    A depth that is not whole is rounded up.

    Args:
        arguments: {name: value} that the teacher is built with. Values that are dicts are arguments of models inside.
        width, depth: between 0 and 1, or None to leave it.

    Raises:
        InputError: no argument is known to be a width (or a depth), or a width gives no whole numbers.
    """
    changed = {}
    if width is not None:
        factors = _scaled_floats(arguments, WIDTH_FACTORS, width)
        changed = factors or _scaled_widths(arguments, width)
        _check_any(changed, arguments, f"--width {shown(width)}: no argument of this architecture is known as a width")
    if depth is not None:
        factors = _scaled_floats(arguments, DEPTH_FACTORS, depth)
        fewer = factors or _walk(arguments, DEPTHS, lambda value: math.ceil(value * depth))
        _check_any(fewer, arguments, f"--depth {shown(depth)}: no argument of this architecture is known as a depth")
        changed = _merged(changed, fewer)
    return changed


def model_arguments(name: str, kwargs: dict, option: str) -> dict:
    """{argument: value} that a model of this name is built with; for ``smaller_arguments``.

    Args:
        name, kwargs, option: as of ``create_model``.
    """
    from weight_selection.sources.timm_models import arguments_of

    return arguments_of(name, kwargs, option)


def fraction(text: str) -> Fraction:
    """The number that a word such as 0.5 or 1/3 means, for the parser of options."""
    try:
        return Fraction(text)
    except ZeroDivisionError as error:
        raise ValueError(text) from error


def shown(number: Fraction) -> str:
    """A number as a user would write it: 0.25, or 1/3 if it has no short decimal form."""
    decimal = f"{float(number):.4g}"
    return decimal if Fraction(decimal) == number else f"{number.numerator}/{number.denominator}"


def _scaled_widths(arguments, width):
    """Widths and heads times a number; what is not whole is refused."""
    widths = WIDTHS - {name for mark, name in PER_HEAD.items() if mark in arguments} | HEADS
    if not _sizes(arguments, widths):
        return {}
    widths |= ENDS
    sizes = _sizes(arguments, widths) + [(name, size) for name, size in _sizes(arguments, KEY_VALUE_HEADS) if size > 1]
    common = math.gcd(*(size for _, size in sizes))
    if width * common % 1:
        sizes.sort(key=lambda pair: pair[0] not in HEADS)  # a head says more than a width
        name, size = next((name, size) for name, size in sizes if width * size % 1)
        below, above = (Fraction(round_(width * common), common) for round_ in (math.floor, math.ceil))
        near = " or ".join(shown(number) for number in (below, above) if 0 < number < 1)
        remedy = f"the nearest that gives whole ones is {near}" if near else "no width gives whole ones"
        raise InputError(
            f"--width {shown(width)}: {name} {size} becomes {shown(width * size)}, which is no whole number; {remedy}"
        )
    changed = _walk(arguments, widths, lambda size: int(size * width))
    return _merged(changed, _walk(arguments, KEY_VALUE_HEADS, lambda size: max(1, int(size * width))))


def _sizes(arguments, names):
    """[(name, whole number)] of arguments, also of models inside."""
    found = []
    for name, value in arguments.items():
        if isinstance(value, dict):
            found += _sizes(value, names)
        elif name in names:
            found += [(name, size) for size in _leaves(value) if type(size) is int and size]
    return found


def _leaves(value):
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (list, tuple)) else [value]


def _walk(arguments, names, change):
    """{name: changed value} of the arguments that are whole numbers, or sequences of them; dicts for models inside."""
    changed = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            inside = _walk(value, names, change)
            changed |= {name: inside} if inside else {}
        elif name in names and all(type(leaf) is int for leaf in _leaves(value)):
            changed[name] = _each(value, change)
    return changed


def _each(value, change):
    return type(value)(_each(part, change) for part in value) if isinstance(value, (list, tuple)) else change(value)


def _scaled_floats(arguments, names, number):
    """The arguments that are factors themselves, times a number."""
    return {name: value * float(number) for name, value in arguments.items() if name in names and type(value) is float}


def _merged(first, second):
    """Two nested dicts in one."""
    both = {key: _merged(first[key], second[key]) for key in first if key in second and isinstance(first[key], dict)}
    return first | second | both


def _check_any(changed, arguments, complaint):
    if not changed:
        numbers = {name: value for name, value in arguments.items() if type(value) in (int, float, tuple, list)}
        names = ", ".join(f"{name}={value}"[:60] for name, value in numbers.items()) or "none that is a number"
        raise InputError(f"{complaint}; it has {names}; change those that you mean with --student_kwargs")
