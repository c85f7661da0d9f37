"""Example inputs of Hugging Face's models, from what a model's config records and what its forward takes."""

import inspect

import torch

IMAGE_SIZE = 224  # pixels, of models whose config records none
TOKENS = 8  # in a sequence; any number would do, as a trace does not look at them


def example_inputs(model) -> dict:
    """Keyword arguments of a Hugging Face model's forward pass: a batch of one.

    Images have the size that the config records, sounds the number of frames, and sequences a few tokens. All are on
    the meta device: a trace runs there, where tensors have shapes and no values.

    Args:
        model: a ``PreTrainedModel``, on any device.

    Returns:
        {name: tensor}, of as many of ``pixel_values``, ``input_features``, ``input_ids`` and ``decoder_input_ids`` as
        the forward takes; with ``use_cache=False`` where it is taken. Empty if none of them is.
    """
    config, takes = model.config, inspect.signature(model.forward).parameters
    inputs = {}
    if "pixel_values" in takes:
        inputs["pixel_values"] = torch.empty(1, *image_shape(config), device="meta")
    if "input_features" in takes and hasattr(config, "num_mel_bins"):
        inputs["input_features"] = torch.empty(1, config.num_mel_bins, _frames(model), device="meta")
    if "input_ids" in takes:
        inputs["input_ids"] = _tokens()
        inputs |= {"attention_mask": _mask()} if "attention_mask" in takes else {}
    if "decoder_input_ids" in takes and config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _tokens()
        inputs |= {"decoder_attention_mask": _mask()} if "decoder_attention_mask" in takes else {}
    if inputs and "use_cache" in takes:  # of keys and values of earlier tokens
        inputs["use_cache"] = False
    return inputs


def image_shape(config) -> tuple:
    """(channels, height, width) of the images that a model with this config is built for; sizes in pixels."""
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _frames(model):
    """The fixed number of frames that Whisper's encoder takes: its convolutions halve them to its positions."""
    return 2 * model.config.max_source_positions


def _tokens():
    return torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")


def _mask():
    """Which tokens see which. Models without one look at the values of positions, which the meta device has not."""
    return torch.zeros(1, 1, TOKENS, TOKENS, device="meta")
