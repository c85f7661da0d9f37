"""Files of the Hugging Face hub, and of addresses: from the local cache, or fetched with a short wait for an answer."""

import re
import sys
from collections.abc import Callable
from concurrent.futures import TimeoutError as NoAnswer  # of its own class before Python 3.11
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from weight_selection.errors import InputError, first_line
from weight_selection.files import in_background

SECONDS = 10  # to wait for the first answer; without a network it may never come


@dataclass(frozen=True)
class Repository:
    """A repository of the hub. The hub is not asked whether it has a newer file than the cache.

    Attributes:
        name: ORG/NAME, or ORG/NAME@REVISION.
        where: the option and the value that named it, for errors.
        remedy: what else the user can do, for errors.
    """

    name: str
    where: str
    remedy: str = "name a directory"

    @property
    def identifier(self) -> str:
        """ORG/NAME."""
        return self.name.partition("@")[0]

    @property
    def revision(self) -> str | None:
        """A branch, tag or commit; None: the default branch."""
        return self.name.partition("@")[2] or None

    def known(self, name: str) -> Path | None:
        """The file of this name in the local cache, or None."""
        import huggingface_hub

        try:
            path = huggingface_hub.try_to_load_from_cache(self.identifier, name, revision=self.revision)
        except ValueError as error:  # huggingface_hub's check of names
            raise InputError(f"{self.where}: {self.identifier} is no name of the hub's; write ORG/NAME") from error
        return Path(path) if isinstance(path, str) else None

    def file(self, name: str, what: str = "weights") -> Path | None:
        """The file of this name, fetched if the cache does not have it; None if the repository has no such file.

        Raises:
            InputError: no network, or no such repository; says ``what`` the file is wanted for.
        """
        import huggingface_hub
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

        if path := self.known(name):
            return path
        address = huggingface_hub.hf_hub_url(self.identifier, name, revision=self.revision)
        try:
            answer_in_time(lambda: huggingface_hub.get_hf_file_metadata(address, timeout=SECONDS))
            return Path(huggingface_hub.hf_hub_download(self.identifier, name, revision=self.revision))
        except RepositoryNotFoundError as error:
            raise self._refused(name, what, "no such repository, or log in with: hf auth login") from error
        except Exception as error:  # the libraries below have errors of their own for everything that may go wrong
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            raise self._refused(name, what, error) from error

    def _refused(self, name, what, reason):
        return InputError(
            f"{self.where}: cannot fetch its {what}, {name} of the hub's {self.name} ({first_line(reason):.200}); "
            f"{self.remedy}, or copy the hub's cache from a machine that has it and set HF_HUB_OFFLINE=1"
        )


def fetch(address: str, where: str, remedy: str) -> Path:
    """The file at an address, in the cache of torch.hub.

    Args:
        where: the option and the value that named it, for errors.
        remedy: what else the user can do, for errors.

    Raises:
        InputError: no network, or not the file that its name promises (torch's names end in part of a SHA-256).
    """
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if path.is_file():
        return path
    check_reachable(address, where, remedy)
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), digest and digest[1], progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        raise InputError(f"{where}: cannot fetch its weights, {address} ({error}); {remedy}") from error
    return path


def check_reachable(address: str, where: str, remedy: str) -> None:
    """Raise InputError unless an address answers in time."""
    try:
        answer_in_time(lambda: urlopen(Request(address, method="HEAD"), timeout=SECONDS).close())
    except OSError as error:
        raise InputError(
            f"{where}: cannot fetch its weights, {address} ({error}); {remedy}, or copy the file into the cache of "
            "torch.hub (TORCH_HOME); HF_HUB_OFFLINE=1 is for files of the hub"
        ) from error


def answer_in_time(ask: Callable) -> Any:
    """What ``ask()`` returns. A TimeoutError after ``SECONDS``, however long names and addresses are still tried."""
    try:
        return in_background(ask).result(SECONDS)
    except NoAnswer as error:
        raise TimeoutError(str(error) or f"no answer in {SECONDS} s") from error
