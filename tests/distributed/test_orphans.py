"""Processes whose parent was killed: they end with it, and what they left in the store does not mislead the next."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

import main
from bench_faults import check_gone
from distributed.parent import end_with_launcher
from distributed.process_group import store_of_start
from distributed.program import Launch
from processes import environment, start_together

ROOT = Path(main.__file__).parent
PARENT = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
CHILD = """
import os, sys, time
sys.platform = sys.argv[1]
from distributed.parent import end_with_launcher
end_with_launcher(os.environ)
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
print("alive")
"""


@pytest.fixture
def start_child():
    """Start a Python program as the child of a process; returns that process, whose output ends with both."""
    parents = []

    def start(*command, **variables):
        command = [sys.executable, "-c", PARENT, sys.executable, *map(str, command)]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        parents.append(subprocess.Popen(command, cwd=ROOT, env=environment(**variables), **pipe))
        return parents[0]

    yield start
    with contextlib.suppress(ProcessLookupError):  # both have ended
        os.killpg(parents[0].pid, signal.SIGKILL)
    parents[0].communicate()


@pytest.mark.parametrize(
    ("platform", "variables", "seconds", "says"),
    [
        ("linux", {"TORCHELASTIC_RUN_ID": "none"}, 60, ""),
        ("darwin", {"TORCHELASTIC_RUN_ID": "none"}, 60, ""),  # it looks every second
        ("linux", {}, 0.2, "alive\n"),  # a shell started it, with nohup
    ],
)
def test_process_ends_with_its_launcher_but_not_with_its_shell(start_child, platform, variables, seconds, says):
    parent = start_child("-c", CHILD, platform, seconds, **variables)
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    assert parent.communicate(timeout=10) == (says, None)


def test_launcher_killed_while_its_worker_imports_torch_takes_the_worker_with_it(start_child, tiny_run):
    """The worker would wait half an hour for a partner that never comes."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    parent = start_child(ROOT / "main.py", *tiny_run, TORCHELASTIC_RUN_ID="none", **variables)
    children, end = Path(f"/proc/{parent.pid}/task/{parent.pid}/children"), time.monotonic() + 60
    while not any("libtorch" in Path(f"/proc/{child}/maps").read_text() for child in children.read_text().split()):
        assert time.monotonic() < end
        time.sleep(0.01)
    parent.kill()
    assert parent.communicate(timeout=10) == ("", None)


def test_worker_that_process_1_has_adopted_ends_with_a_line(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(sys, "executable", "/not/what/process/1/runs")
    with pytest.raises(SystemExit, match="torchrun, which started this process, is gone"):
        end_with_launcher({"TORCHELASTIC_RUN_ID": "none"})
    end_with_launcher({})


def test_loader_worker_that_hangs_ends_with_its_process(tiny_run, tmp_path):
    options = ["--epochs", "1000", "--num_workers", "1", "--output_dir", "run"]
    run = start_together(1, [*tiny_run, *options], tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint-0.pth").exists():
        assert time.monotonic() < end, run.printed(0)
        time.sleep(0.01)
    workers = run.workers()
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    run.kill()
    check_gone(workers)


def test_each_start_has_a_part_of_the_store_of_its_own():
    """The second start's other processes come first, and find the name of the first start."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def join(rank):
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        return store_of_start(store, Launch(rank, 3, rank), timeout=20)

    for address in ("old", "new"):
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(join, rank) for rank in (1, 2)]
            time.sleep(0.1)
            first = pool.submit(join, 0).result()
        assert not first.check(["address"])
        first.set("address", address)
        assert [other.result().get("address").decode() for other in others] == [address, address]
