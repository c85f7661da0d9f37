"""What all command lines share: the parser, values that are true or false, arguments of a model. Imports no torch."""

import argparse
import ast
import difflib
import sys
from collections.abc import Iterable

from weight_selection.errors import InputError


class Parser(argparse.ArgumentParser):
    """The parser of a program's options: dashes and underscores are alike, and a mistake is an InputError.

    It takes no abbreviated options.
    """

    def __init__(self, program: str, description: str):
        super().__init__(prog=program, description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelt(word) for word in words], namespace)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
            known = [word for action in shown for word in action.option_strings]
            what = "no such option" if name.startswith("-") else "belongs to no option"
            raise InputError(f"{name}: {what}{did_you_mean(name, known)}; see --help")
        return namespace

    def error(self, message):
        raise InputError(f"{message.removeprefix('argument ')}; see --help")

    def _spelt(self, word):
        """A word in which an option has underscores, if the parser knows it so."""
        name, equals, value = word.partition("=")
        spelt = name[:2] + name[2:].replace("-", "_")
        known = self._option_string_actions
        return spelt + equals + value if word.startswith("--") and name not in known and spelt in known else word


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Says an option's default, as it would be typed, where there is one and its help does not say it.

    A description keeps its lines.
    """

    def _get_help_string(self, action):
        default = action.default
        if default in (None, argparse.SUPPRESS, {}, []) or action.nargs == 0 or "default" in action.help:
            return action.help
        words = default if isinstance(default, (list, tuple)) else [default]
        words = [str(word).lower() if isinstance(word, bool) else str(word) for word in words]
        return f"{action.help} (default: {' '.join(words).replace('%', '%%')})"


class Choice:
    """As an option's ``type``: the choice that a word is, in upper or lower case. It refuses all other words."""

    def __init__(self, choices: Iterable[str]):
        self.choices = {choice.lower(): choice for choice in choices}

    def __call__(self, text: str) -> str:
        if text.lower() not in self.choices:
            known = self.choices.values()
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(known)}{did_you_mean(text, known)}")
        return self.choices[text.lower()]


def one_of(choices: Iterable[str]) -> dict:
    """What ``add_argument`` takes for an option that has choices."""
    return {"type": Choice(choices), "choices": list(choices)}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean NAME?" of the known name that is most like a word, whatever its case; empty if none is."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, 1, 0.6)
    return f"; did you mean {names[near[0]]}?" if near else ""


class Kwargs(argparse.Action):
    """Makes {K: V} of the words ``K=V ...``. V is the Python value that the word is a literal of, or else the text.

    ``true`` and ``false`` are literals too: as texts both would count as true.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for word in values:
            name, equals, value = word.partition("=")
            if not equals:
                parser.error(f"{option_string} {word}: write NAME=VALUE")
            try:
                pairs[name] = ast.literal_eval(value.title() if value in ("true", "false") else value)
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
