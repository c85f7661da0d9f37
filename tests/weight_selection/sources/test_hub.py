"""Fetching files: a server that never answers is waited for only shortly, and what is wrong is one line."""

import hashlib
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from weight_selection import InputError
from weight_selection.sources import hub
from weight_selection.sources.hub import Repository, fetch

FILES = {"/org/tiny/resolve/main/config.json": b"{}", "/tiny.pth": b"weights"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does."""

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, whole):
        content = FILES.get(self.path)
        repository = self.path.startswith("/org/tiny/")
        self.send_response(200 if content is not None else 404 if repository else 401)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if repository else "RepoNotFound")
        self.send_header("ETag", hashlib.sha1(content or b"").hexdigest())
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if whole and content:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def silent_server():
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def closed_server():
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Send what is meant for the hub to an address."""

    def connect(address):
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        huggingface_hub.utils._http.reset_sessions() if hasattr(huggingface_hub.utils._http, "reset_sessions") else None

    return connect


@pytest.mark.parametrize("lost", [silent_server, closed_server])
def test_without_an_answer_the_file_and_the_remedies_are_named_in_time(lost, online, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    with lost() as address:
        online(address)
        begin = time.monotonic()
        with pytest.raises(InputError) as refusal:
            Repository("org/tiny", "--student transformers:org/tiny", "do this").file("config.json", "configuration")
        assert time.monotonic() - begin < 3
    message = str(refusal.value)
    start = "--student transformers:org/tiny: cannot fetch its configuration, config.json of the hub's org/tiny ("
    assert message.startswith(start)
    assert "); do this, or copy the hub's cache" in message
    assert message.endswith("set HF_HUB_OFFLINE=1")
    assert "\n" not in message


def test_files_of_the_hub_are_fetched_once_and_a_file_that_is_not_there_is_told_from_no_repository(server, online):
    online(server)
    repository = Repository("org/tiny", "--student hf-hub:org/tiny")
    assert repository.known("config.json") is None
    assert repository.file("config.json").read_bytes() == b"{}"
    assert repository.known("config.json").parent.name == COMMIT
    assert repository.file("model.safetensors") is None
    with pytest.raises(InputError, match="no such repository, or log in with: hf auth login"):
        Repository("org/other", "--student hf-hub:org/other").file("config.json")


@pytest.mark.parametrize("lost", [silent_server, closed_server])
def test_addresses_that_do_not_answer_are_refused_in_time(lost, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with lost() as address:
        begin = time.monotonic()
        with pytest.raises(InputError) as refusal:
            fetch(f"{address}/tiny.pth", "--student torchvision:tiny", "do this")
        assert time.monotonic() - begin < 3
    assert str(refusal.value).startswith(f"--student torchvision:tiny: cannot fetch its weights, {address}/tiny.pth (")
    assert "do this, or copy the file into the cache of torch.hub (TORCH_HOME); HF_HUB_OFFLINE" in str(refusal.value)


def test_files_of_torch_are_fetched_into_its_cache_and_compared_with_the_digest_in_their_names(
    server, monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("/a-00000000.pth", f"/b-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"):
        monkeypatch.setitem(FILES, name, b"weights")
    path = fetch(f"{server}/tiny.pth", "x", "y")
    assert (path, path.read_bytes()) == (tmp_path / "hub" / "checkpoints" / "tiny.pth", b"weights")
    assert fetch(f"{server}{name}", "x", "y").read_bytes() == b"weights"
    with pytest.raises(InputError, match="x: cannot fetch its weights, .*a-00000000.pth .*hash.*; y"):
        fetch(f"{server}/a-00000000.pth", "x", "y")
    assert not (path.parent / "a-00000000.pth").exists()
