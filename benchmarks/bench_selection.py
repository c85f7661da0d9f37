#!/usr/bin/env python3
"""Seconds and memory of weight_selection.py as a whole process, against the plain way, in the same run.

    python benchmarks/bench_selection.py
    python benchmarks/bench_selection.py --large    # needs 8 GB of disk in the directory for temporary files

The teachers are ViT-L/16 with 21,843 classes (1.3 GB) and ConvNeXt-B, with random values. The plain way builds the
whole teacher, loads it, clones and indexes every tensor, and writes them; the benchmark checks that both ways write the
same. The limit imports torch and reads the bytes of the selected tensors once. ViT-L with half its layers shows whether
memory grows with depth. Each row has the medians of some starts.

LLaMA-30B to -7B is a plan alone, printed from two config.json. There, plain only builds both models without numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"seconds": 0.5, "memory": 0.3}  # of the plain way's
PLAN_GOAL = "goal of the plan of LLaMA-30B: under 60 seconds and 4000 MB"
VIT, CONVNEXT = "vit_large_patch16_224", "convnext_base"
PAIRS = {  # teacher, its arguments, student
    "ViT-L to ViT-T": (VIT, {"num_classes": 21843}, "vit_tiny"),
    "ViT-L, 12 layers, to ViT-T": (VIT, {"num_classes": 21843, "depth": 12}, "vit_tiny"),
    "ConvNeXt-B to -F": (CONVNEXT, {"num_classes": 21841}, "convnext_femto"),
}
LLAMAS = [  # config.json of the 30B and the 7B
    {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52},
    {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
]
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000}
BUILD = """
import sys, torch, transformers
with torch.device("meta"):
    models = [transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
              for path in sys.argv[1:]]
"""
MAKE = """
import json, sys, timm, torch
name, kwargs, path = sys.argv[1:]
torch.manual_seed(0)
torch.save(timm.create_model(name, **json.loads(kwargs)).state_dict(), path)
"""
PLAIN = """
import json, sys, timm, torch
name, kwargs, path, student, output = sys.argv[1:]
teacher = timm.create_model(name, **json.loads(kwargs))
teacher.load_state_dict(torch.load(path, weights_only=True))
weights = {key: value.clone() for key, value in teacher.state_dict().items()}
models = {"vit_tiny": ("vit_tiny_patch16_224", {}), "convnext_femto": ("convnext_femto", {"conv_mlp": False})}
name, kwargs = models[student]
selected = {}
for key, target in timm.create_model(name, **kwargs).state_dict().items():
    if not key.startswith("head."):
        parts = []
        for value, part in zip(*(tensor.chunk(3 if ".qkv." in key else 1) for tensor in (weights[key], target))):
            for dim, (t, s) in enumerate(zip(value.shape, part.shape)):
                even = torch.arange(s) * (t // s) if t % s == 0 else torch.linspace(0, t - 1, s).round().long()
                value = value.index_select(dim, even)
            parts.append(value)
        selected[key] = torch.cat(parts)
torch.save(selected, output)
"""
LARGE = {"hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 20, "num_hidden_layers": 24}
LARGE_GOAL = 1.3  # of the student's bytes: itself, the largest tensor (0.07) as it is cut, what the allocator keeps
MAKE_LARGE = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import save_file
directory, kwargs = Path(sys.argv[1]), json.loads(sys.argv[2])
config = transformers.LlamaConfig(**kwargs, architectures=["LlamaForCausalLM"], dtype="bfloat16")
config.save_pretrained(directory)
with torch.device("meta"):
    shapes = {key: value.shape for key, value in transformers.LlamaForCausalLM(config).state_dict().items()}
values = (0.02 * torch.randn(max(shape.numel() for shape in shapes.values()))).bfloat16()
shards = {}
for key, shape in shapes.items():
    shards.setdefault(f"model-{key.split('.')[2] if '.layers.' in key else 'rest'}.safetensors", {})[key] = shape
for name, content in shards.items():
    tensors = {key: values[:shape.numel()].reshape(shape).clone() for key, shape in content.items()}
    save_file(tensors, directory / name, {"format": "pt"})
index = {"weight_map": {key: name for name, content in shards.items() for key in content}}
(directory / "model.safetensors.index.json").write_text(json.dumps(index))
"""
LIMIT = """
import sys, torch
left = int(sys.argv[2])
with open(sys.argv[1], "rb", buffering=0) as file:
    while left > 0:
        left -= len(file.read(min(left, 1 << 24)))
"""


def measure(words) -> tuple:
    """Seconds and peak memory (MB) of a process."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(map(str, words))[:200]}")
    return time.monotonic() - start, usage.ru_maxrss / 1000  # which Linux counts in units of 1024 bytes


def medians(measures: dict, turns: int, warm_ups: int = 1) -> dict:
    """{name: median of what the function returns, or of each number in it}, over some turns after those that warm up.

    A turn calls every function once.
    """
    found = [{name: measure() for name, measure in measures.items()} for _ in range(warm_ups + turns)]
    return {name: np.median([turn[name] for turn in found[warm_ups:]], axis=0) for name in measures}


def compare(variants: dict, starts: int) -> dict:
    """{name of a variant: medians of its seconds and of its MB}; ``variants`` are words of commands.

    The first start warms up the file's pages and Python's byte code.
    """
    return medians({name: partial(measure, words) for name, words in variants.items()}, starts)


def print_rows(pair, found) -> None:
    for name, (seconds, memory) in found.items():
        ratios = [metric / base for metric, base in zip((seconds, memory), found["plain"], strict=True)]
        print(f"{pair:28}{name:10}  {seconds:7.2f}  {ratios[0]:8.2f}  {memory:7.0f}  {ratios[1]:8.2f}", flush=True)


def plan_from_configs(starts) -> None:
    """Print a plan of two language models of which only config.json is there."""
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, name) for name in ("30B", "7B")]
        for path, sizes in zip(paths, LLAMAS, strict=True):
            path.mkdir()
            (path / "config.json").write_text(json.dumps(LLAMA | sizes))
        names = [f"transformers:{path}" for path in paths]
        options = ["--pretrained_model", names[0], "--student", names[1], "--dry_run"]
        variants = {"plain": ["-c", BUILD, *paths], "plan": [ROOT / "weight_selection.py", *options]}
        print_rows("LLaMA-30B to -7B", compare(variants, starts))


def bench_large():
    """Peak memory of a selection from a large checkpoint, beyond that of its plan, to the bytes of the student."""
    with tempfile.TemporaryDirectory() as directory:
        teacher, student = Path(directory, "teacher"), Path(directory, "student.safetensors")
        teacher.mkdir()
        measure(["-c", MAKE_LARGE, teacher, json.dumps(LARGE)])
        command = [ROOT / "weight_selection.py", "--pretrained_model", f"transformers:{teacher}", "--width", "0.75"]
        _, plan = measure([*command, "--dry_run"])
        seconds, memory = measure([*command, "--output_dir", student])
        size = student.stat().st_size / 1e6
    ratio = (memory - plan) * 1.024 / size  # a kilobyte of the system has 1024 bytes
    print(f"LLaMA, {size:.0f} MB: {seconds:.0f} seconds, peak {memory:.0f} MB, of which its plan takes {plan:.0f}")
    print(f"memory beyond the plan's: {ratio:.2f} of the student's bytes; goal: at most {LARGE_GOAL}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="of each variant")
    parser.add_argument("--large", action="store_true", help="only the memory of a selection from a large LLaMA")
    args = parser.parse_args()
    if args.large:
        bench_large()
        return
    print(f"{'':28}{'':10}  seconds  to plain  peak MB  to plain", flush=True)
    for pair, (teacher, kwargs, student) in PAIRS.items():
        with tempfile.TemporaryDirectory() as directory:
            path, plain, ours = (Path(directory, name) for name in ("teacher.pth", "plain.pth", "ours.pth"))
            text = json.dumps(kwargs)
            measure(["-c", MAKE, teacher, text, path])
            measure(["-c", PLAIN, teacher, text, path, student, plain])
            whole, selected = (torch.load(file, weights_only=True, mmap=True) for file in (path, plain))
            count = sum(whole[key].nbytes for key in selected)  # of the teacher's tensors that are selected from
            options = ["--pretrained_model", teacher, "--pretrained_path", path, "--student", student, "--overwrite"]
            options += ["--teacher_kwargs", *(f"{key}={value}" for key, value in kwargs.items())]
            variants = {
                "plain": ["-c", PLAIN, teacher, text, path, student, plain],
                "selection": [ROOT / "weight_selection.py", *options, "--output_dir", ours],
                "limit": ["-c", LIMIT, path, count],
            }
            found = compare(variants, args.starts)
            expected, written = (torch.load(file, weights_only=True) for file in (plain, ours))
            assert expected.keys() == written.keys()
            assert all(torch.equal(expected[key], value) for key, value in written.items())
        print_rows(pair, found)
    plan_from_configs(args.starts)
    print("goals: " + ", ".join(f"{name} at most {ratio} of the plain way's" for name, ratio in GOALS.items()))
    print(PLAN_GOAL)


if __name__ == "__main__":
    main()
