"""Errors of one line, and the exit status of a program that ends with one. Imports no torch, which takes seconds."""

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: the option, its value, what to do."""


def printable(text: object) -> str:
    """A text in one line, without the control characters that a stranger's file may have put into it."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))


def first_line(error: BaseException) -> str:
    """The first line of what an error says; of one that says nothing, the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_program(name: str, main: Callable) -> NoReturn:
    """Run ``main()`` and exit with a status; an error is one line on stderr instead of a traceback.

    0: done. 2: ``InputError``. 130: Ctrl-C. 141: who read the output has gone.
    """
    status, line = outcome(main)
    if line is not None:
        print(f"{name}: {printable(line)[:2000]}", file=sys.stderr)
    sys.exit(status)


def outcome(main: Callable) -> tuple:
    """Run ``main()``; its exit status, and what to print or None."""
    try:
        main()
        return 0, None
    except InputError as error:
        return 2, f"error: {error}"
    except KeyboardInterrupt:
        return 130, "interrupted"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it flushes
        return 141, None


FLAGS = ("include_head_norm", "include_head", "allow_unused")
CHOICES = ("element_selection", "layer_selection", "exclude")


def in_python(message: str) -> str:
    """Translate an error from the language of the command line: ``--exclude norm`` becomes ``exclude=norm``."""
    message = re.sub(r"^(teacher|student|weights) (?=\S+: )", r"\1=", message)
    message = re.sub(r"^--(\w+) (?!is missing)([^:]+): ", r"\1=\2: ", message)
    message = re.sub(r"--(?:student|teacher)_kwargs (?=\w+=)", "", message)
    message = re.sub(r"--(student|teacher)_kwargs", r"arguments of the \1", message)
    message = re.sub(rf"--({'|'.join(FLAGS)})\b", r"\1=True", message)
    message = re.sub(rf"--({'|'.join(CHOICES)}) (?=\w)", r"\1=", message)
    message = re.sub(r"\(--classifier ([\w.]+)(?: \.\.\.)?\)", r"(classifier=('\1',))", message)
    return re.sub(r"(?<!\S)--(?=\w)", "", message)
