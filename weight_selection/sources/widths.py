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
    "d_ff", "n_embd", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_size", "hidden_sizes",
    "decoder_hidden_size", "neck_hidden_sizes", "intermediate_size", "moe_intermediate_size",
    "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank",
}
ENDS = {  # scaled with other widths, never alone
    "stem_width", "stem_chs", "stem_hidden_dim", "head_widths", "embedding_size", "word_embed_proj_dim",
    "projection_size",
}
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
        arguments: {name: value} that the teacher is built with. Configurations inside it are dicts.
        width, depth: between 0 and 1, or None to leave it.

    Returns:
        {name: value}; what is in a configuration inside has its name before it, as in ``vision_config.hidden_size``.

    Raises:
        InputError: no argument is known to be a width (or a depth), or a width gives no whole numbers.
    """
    flat = _flat(arguments)
    changed = {}
    if width is not None:
        changed = _scaled_factors(flat, WIDTH_FACTORS, width) or _scaled_widths(flat, width)
        _check_any(changed, flat, f"--width {shown(width)}: no argument of this architecture is known as a width")
    if depth is not None:
        fewer = _scaled_factors(flat, DEPTH_FACTORS, depth) or _scaled_depths(flat, depth)
        _check_any(fewer, flat, f"--depth {shown(depth)}: no argument of this architecture is known as a depth")
        changed |= fewer
    return changed


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


def _flat(arguments, before=""):
    """Arguments without dicts inside: {name, with those of the configurations around it: value}."""
    flat = {}
    for name, value in arguments.items():
        inside = isinstance(value, dict) and name.endswith("_config")
        flat |= _flat(value, f"{before}{name}.") if inside else {before + name: value}
    return flat


def _named(flat, names):
    """The arguments of these names that are whole numbers, or sequences of them."""
    return {
        name: value
        for name, value in flat.items()
        if _last(name) in names and all(type(leaf) is int for leaf in _leaves(value))
    }


def _last(name):
    return name.rpartition(".")[2]


def _around(name):
    return name.removesuffix(_last(name))


def _leaves(value):
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (list, tuple)) else [value]


def _each(value, change):
    return type(value)(_each(part, change) for part in value) if isinstance(value, (list, tuple)) else change(value)


def _scaled_widths(flat, width):
    """Widths and heads times a number; what is not whole is refused."""
    widths = WIDTHS - {name for mark, name in PER_HEAD.items() if mark in flat}
    if not _named(flat, widths | HEADS):
        return {}
    scaled = _named(flat, widths | ENDS | HEADS) | {
        name: value for name, value in _named(flat, KEY_VALUE_HEADS).items() if value > 1
    }
    sizes = [(name, size) for name, value in scaled.items() for size in _leaves(value) if size]
    common = math.gcd(*(size for _, size in sizes))
    if width * common % 1:
        sizes.sort(key=lambda pair: _last(pair[0]) not in HEADS)  # a head says more than a width
        name, size = next((name, size) for name, size in sizes if width * size % 1)
        below, above = (Fraction(round_(width * common), common) for round_ in (math.floor, math.ceil))
        near = " or ".join(shown(number) for number in (below, above) if 0 < number < 1)
        remedy = f"the nearest that gives whole ones is {near}" if near else "no width gives whole ones"
        raise InputError(
            f"--width {shown(width)}: {name} {size} becomes {shown(width * size)}, which is no whole number; {remedy}"
        )
    return {name: _each(value, lambda size: int(size * width)) for name, value in scaled.items()}


def _scaled_depths(flat, depth):
    """Depths times a number; a list with a word for each layer, and the choice of layers to give, follow from them.

    A number of stages, beside a list with the depth of each, is no depth.
    """
    depths = _named(flat, DEPTHS)
    stages = [(_around(name), len(value)) for name, value in depths.items() if isinstance(value, (list, tuple))]
    depths = {name: value for name, value in depths.items() if (_around(name), value) not in stages}
    changed = {name: _each(value, lambda layers: math.ceil(layers * depth)) for name, value in depths.items()}
    for name, value in flat.items():
        layers = f"{_around(name)}num_hidden_layers"
        if _last(name) == "layer_types" and layers in depths and value:
            changed[name] = value[: changed[layers]]
        if _last(name) in ("out_features", "out_indices") and value and depths:
            changed[name] = None
    return changed


def _scaled_factors(flat, names, number):
    """The arguments that are factors themselves, times a number."""
    factors = {name: value for name, value in flat.items() if _last(name) in names and type(value) is float}
    return {name: value * float(number) for name, value in factors.items()}


def _check_any(changed, flat, complaint):
    if not changed:
        numbers = {name: value for name, value in flat.items() if type(value) in (int, float, tuple, list)}
        names = ", ".join(f"{name}={value}"[:60] for name, value in numbers.items()) or "none that is a number"
        raise InputError(f"{complaint}; it has {names}; change those that you mean with --student_kwargs")
