"""What all command lines share: the parser, values that are true or false, arguments of a model. Imports no torch."""

import argparse
import ast

from weight_selection.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated options, and raises InputError where argparse would print its usage."""

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=program,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise InputError(f"{message}; see --help")


class Kwargs(argparse.Action):
    """Makes {K: V} of the words ``K=V ...``. V is the Python value that the word is a literal of, or else the text."""

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


def boolean(text: str) -> bool:
    """The value of a word such as true, yes, 1, false, no or 0. As an option's ``type`` it refuses all other words."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def check_kwargs(kwargs: dict, option: str, taken: dict) -> None:
    """Refuse arguments of a model that are set in another way, and those of ``create_model`` itself.

    Args:
        kwargs: the arguments that the user gave.
        option: the option that gave them.
        taken: {argument: why the user is not to give it}.

    Raises:
        InputError: names the first argument that is refused.
    """
    own = ("name", "option", "device", "input_size", "pretrained", "checkpoint_path")
    refused = dict.fromkeys(own, "it is not the model's") | taken
    for key, value in kwargs.items():
        if key in refused:
            raise InputError(f"{option} {key}={value}: leave it out; {refused[key]}")
