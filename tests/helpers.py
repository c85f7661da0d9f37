"""Reading what a run of main.py left, and comparing weights."""

import json

import torch


def read_log(directory):
    return [json.loads(row) for row in (directory / "log.txt").read_text().splitlines()]


def read_results(directory):
    return json.loads((directory / "results.json").read_text())


def read_checkpoint(directory, name):
    return torch.load(directory / f"checkpoint-{name}.pth", weights_only=True)


def assert_same(ours, theirs, **tolerance):
    """Equal keys and tensors; equal bit for bit unless a tolerance is given."""
    assert ours.keys() == theirs.keys()
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def differ(ours, theirs):
    return any(not torch.equal(ours[key], theirs[key]) for key in ours)
