"""A Python that starts in milliseconds, for scripts that call Python many times.

``make_python`` writes an executable that stands in for the interpreter. It hands its arguments, environment, directory
and standard streams to a server, a fork of this process, which has imported everything; the server forks a process,
which runs what ``python SCRIPT``, ``python -m MODULE`` or ``python -c PROGRAM`` would run.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch

CLIENT = """#!{python} -IS
import json, os, socket, sys
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
        server = os.fork()
        if server == 0:
            serve(listener)
    try:
        yield python
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def serve(listener: socket.socket) -> NoReturn:
    """Answer calls until the process is killed."""
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            answer(client)
        client.close()
        with contextlib.suppress(ChildProcessError):  # those that have answered
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def answer(client: socket.socket) -> NoReturn:
    """Run what a client asks for in a process of its own, and send the client its exit status."""
    call, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
    while not call.endswith(b"\n"):
        call += client.recv(1 << 16)
    process = os.fork()
    if process == 0:
        run(*json.loads(call), streams)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    client.sendall(f"{status if status >= 0 else 128 - status}\n".encode())
    os._exit(0)


def run(words: list, directory: str, environ: dict, streams: list) -> NoReturn:
    """Become ``python *words``, started there with this environment and these standard streams."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # and not pytest's
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(int(environ.get("OMP_NUM_THREADS", 1)))
    status = 0
    try:
        run_as_python_does(words)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_as_python_does(words: list) -> None:
    """Run what the words of a command line name: a script, ``-m`` a module, or ``-c`` a program."""
    if words[0] == "-u":  # write at once: output is written line by line anyway
        words = words[1:]
    if words[0] not in ("-c", "-m"):
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
        return
    option, what, *rest = words
    sys.argv = [option, *rest]
    sys.path.insert(0, str(Path.cwd()))
    if option == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
