#!/usr/bin/env python3
"""Features of projected students, timm's and Hugging Face's: the accuracy of a ridge classifier on Flowers-102.

    python experiments/huggingface_layout.py TEACHER --output hf/teacher
    python scripts/calibration_images.py flowers data/ hf/images
    python weight_selection.py --pretrained_model transformers:hf/teacher --element_selection project \\
      --student_kwargs hidden_size=96 num_attention_heads=3 intermediate_size=384 \\
      --calibration hf/images --output_dir hf/hf.safetensors
    python weight_selection.py --pretrained_model vit_tiny_patch16_224.augreg_in21k_ft_in1k --pretrained_path TEACHER \\
      --student vit_tiny --student_kwargs embed_dim=96 num_heads=3 --element_selection project \\
      --calibration hf/images --output_dir hf/timm.safetensors
    python experiments/huggingface_probe.py data/ hf/hf.safetensors hf/timm.safetensors

Nothing is trained. The classifier is fitted in closed form to the class tokens of the 2,040 training images, and tested
on 3,000 of the test images, drawn by seed 0. Both students run in Hugging Face's model.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.datasets import Flowers102
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from huggingface_layout import in_layout
from weight_selection.arguments import Parser
from weight_selection.errors import run_program

CLASSES, TEST_IMAGES = 102, 3000
HALF = [0.5, 0.5, 0.5]
TRANSFORM = Compose([Resize(224), CenterCrop(224), ToTensor(), Normalize(HALF, HALF)])


def open_student(path: str) -> torch.nn.Module:
    """Hugging Face's ViT of half ViT-T's width, with the weights of a file in its own layout or in timm's."""
    weights = load_file(path)
    if "pos_embed" in weights:
        weights = in_layout(weights)
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 384, "layer_norm_eps": 1e-6}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False).eval()
    model.load_state_dict({key.removeprefix("vit."): value for key, value in weights.items()})
    return model


@torch.no_grad()
def features(model: torch.nn.Module, dataset: Dataset) -> tuple:
    """Class tokens (images, 96) in float64, and the labels (images,)."""
    batches = [(model(images).last_hidden_state[:, 0].double(), labels) for images, labels in DataLoader(dataset, 64)]
    return tuple(map(torch.cat, zip(*batches, strict=True)))


def accuracy(train: tuple, test: tuple, ridge: float) -> float:
    """Percent of the test images that ridge regression to centred one-hot labels gets right.

    ``ridge`` is in units of the mean variance of the features.
    """
    (x, labels), (z, expected) = train, test
    targets = torch.nn.functional.one_hot(labels, CLASSES).double()
    mean, offset = x.mean(0), targets.mean(0)
    x, z = x - mean, z - mean
    penalty = ridge * x.var(0).mean() * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x / len(x) + penalty, x.T @ (targets - offset) / len(x))
    return ((z @ weight).argmax(1) == expected).double().mean().item() * 100


def main(argv=None) -> None:
    parser = Parser("huggingface_probe.py", "Accuracy of a ridge classifier on the features of projected students.")
    parser.add_argument("data", metavar="DATA", help="directory that holds flowers-102/")
    parser.add_argument("files", metavar="FILE", nargs="+", help="first weights, in timm's layout or Hugging Face's")
    args = parser.parse_args(argv)
    train = ConcatDataset([Flowers102(args.data, split, TRANSFORM) for split in ("train", "val")])
    test = Flowers102(args.data, "test", TRANSFORM)
    drawn = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:TEST_IMAGES]
    for path in args.files:
        model = open_student(path)
        found = features(model, train), features(model, Subset(test, drawn.tolist()))
        print(path, *(f"ridge {ridge:g}: {accuracy(*found, ridge):.2f}" for ridge in (1e-3, 1e-2, 1e-1)))


if __name__ == "__main__":
    run_program("huggingface_probe.py", main)
