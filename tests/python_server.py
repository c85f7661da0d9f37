"""A Python that starts in milliseconds, for scripts that call Python many times.

``make_python`` writes an executable that stands in for the interpreter. It hands its arguments, environment, directory
and standard streams to a server, which has imported the libraries; the server forks a process, which runs the script
as ``python SCRIPT`` does. Each process imports the repository's own modules for itself.
"""

import contextlib
import importlib
import json
import os
import runpy
import selectors
import socket
import subprocess
import sys
import traceback
from pathlib import Path

LIBRARIES = ("timm", "torchvision", "matplotlib.pyplot", "scipy")  # and what these import, such as torch

CLIENT = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1].startswith("-"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)])
    socket.send_fds(server, [call.encode() + b"\\n"], [0, 1, 2])
    sys.exit(int(server.makefile().readline() or 1))
"""


@contextlib.contextmanager
def make_python(directory: Path):
    """Path of an executable in ``directory`` that runs Python scripts; it works as long as the block lasts."""
    address, python = directory / "socket", directory / "python"
    python.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    python.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        command = [sys.executable, __file__, str(listener.fileno())]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
    with server:  # it ends with its standard input
        yield python


def serve(listener: socket.socket) -> None:
    """Answer calls until standard input ends."""
    for library in LIBRARIES:
        importlib.import_module(library)
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while all(key.fileobj is listener for key, _ in selector.select()):
            client, _ = listener.accept()
            if os.fork() == 0:
                answer(client)
            client.close()
            with contextlib.suppress(ChildProcessError):  # those that have answered
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def answer(client: socket.socket) -> None:
    """Run the script that a client asks for in a process of its own, and send the client its exit status."""
    call, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
    while not call.endswith(b"\n"):
        call += client.recv(1 << 16)
    process = os.fork()
    if process == 0:
        run_script(*json.loads(call), streams)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    client.sendall(f"{status if status >= 0 else 128 - status}\n".encode())
    os._exit(0)


def run_script(words: list, directory: str, environ: dict, streams: list) -> None:
    """Become ``python *words``, started there with this environment and these standard streams."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    if "OMP_NUM_THREADS" in environ:
        sys.modules["torch"].set_num_threads(int(environ["OMP_NUM_THREADS"]))
    status = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # to unload the libraries would take a second
