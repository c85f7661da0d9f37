"""What the command lines here share: parsers that report in one line, and arguments of models. Imports no torch."""

import argparse
import ast

from weight_selection.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and reports what is wrong in one line."""

    def __init__(self, program, description):
        super().__init__(
            prog=program,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise InputError(f"{message}; see --help")


class Kwargs(argparse.Action):
    """``K=V ...`` arguments, as {K: V} with V the Python value that it reads as, or else the text."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for word in values:
            name, equals, value = word.partition("=")
            if not equals:
                parser.error(f"{option_string} {word}: write NAME=VALUE")
            try:
                pairs[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[name] = value
        setattr(namespace, self.dest, pairs)


def boolean(text):
    """Value of an option that takes true or false."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def check_kwargs(kwargs: dict, option: str, taken: dict) -> None:
    """Refuse model arguments that are set in another way.

    Args:
        kwargs: what the user gave.
        option: the option it was given with.
        taken: {argument: what to do instead}, beside the arguments of ``create_model`` itself.

    Raises:
        InputError: names the first.
    """
    own = ("name", "option", "device", "input_size", "pretrained", "checkpoint_path")
    own = dict.fromkeys(own, "it is not the model's")
    for key, value in kwargs.items():
        if key in own | taken:
            raise InputError(f"{option} {key}={value}: leave it out; {(own | taken)[key]}")
