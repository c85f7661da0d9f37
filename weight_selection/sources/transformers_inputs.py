"""Example inputs of Hugging Face's models, from what a model's config records and what its forward takes."""

import inspect

import torch

IMAGE_SIZE = 224  # pixels, of models whose config records none
TOKENS = 8  # in a sequence; any number would do, as a trace does not look at them


def example_inputs(model: torch.nn.Module) -> dict:
    """Keyword arguments of a Hugging Face model's forward pass: a batch of one.

    Images have the size that the config records, videos and sounds also the number of frames, sequences a few tokens.
    Images and sounds are on the meta device: a trace needs their shapes only. Tokens and masks are small and have
    values, with which a model can also be run.

    Args:
        model: a ``PreTrainedModel``, on any device.

    Returns:
        {name: tensor}, of as many of ``pixel_values``, ``input_values``, ``input_features``, ``input_ids`` and
        ``decoder_input_ids`` as the forward takes, with their masks, and ``use_cache=False`` where it is taken.
    """
    config, takes = model.config, inspect.signature(model.forward).parameters
    inputs = {}
    if "pixel_values" in takes:
        frames = [config.num_frames] if getattr(config, "num_frames", None) else []  # of a video
        inputs["pixel_values"] = torch.empty(1, *frames, *image_shape(config), device="meta")
    if "input_values" in takes and hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        inputs["input_values"] = torch.empty(1, config.max_length, config.num_mel_bins, device="meta")
    if "input_features" in takes and hasattr(config, "num_mel_bins"):
        length = 2 * config.max_source_positions  # Whisper's convolutions halve it to the positions of its encoder
        inputs["input_features"] = torch.empty(1, config.num_mel_bins, length, device="meta")
    if "input_ids" in takes:
        inputs |= _tokens(takes, "")
    if "decoder_input_ids" in takes and config.is_encoder_decoder:
        inputs |= _tokens(takes, "decoder_")
    if inputs and "use_cache" in takes:  # of keys and values of earlier tokens
        inputs["use_cache"] = False
    return inputs


def token_heads(model: torch.nn.Module) -> tuple:
    """Names of the linear layers whose outputs are tokens: a language model's head."""
    head = model.get_output_embeddings()
    return tuple(name for name, module in model.named_modules() if module is head)


def image_shape(config) -> tuple:
    """(channels, height, width) of the images that a model with this config is built for; sizes in pixels."""
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _tokens(takes, prefix):
    """A sequence, and a mask that lets every token be seen."""
    tokens = {f"{prefix}input_ids": torch.zeros(1, TOKENS, dtype=torch.int64)}
    mask = {f"{prefix}attention_mask": torch.ones(1, TOKENS, dtype=torch.int64)}
    return tokens | {name: value for name, value in mask.items() if name in takes}
