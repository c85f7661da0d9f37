#!/usr/bin/env python3
"""Print Table 1 of the paper, the sizes of its students and teachers, as Markdown.

python scripts/print_configurations.py

The sizes are counted in the models themselves, with a classifier for the 1,000 classes of ImageNet-1K.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import torch.nn as nn

from weight_selection.arguments import Parser
from weight_selection.errors import run_program
from weight_selection.sources.timm_models import create_model

MODELS = {
    "ViT-T (student)": "vit_tiny",
    "ConvNeXt-F (student)": "convnext_femto",
    "ViT-S (teacher)": "vit_small",
    "ConvNeXt-T (teacher)": "convnext_tiny",
}
NOTE = "The paper's table has the embedding dimensions of ConvNeXt-F and ConvNeXt-T swapped; here each has its own."


def configuration(model: nn.Module) -> dict:
    """The column of a model, {row: value}; a ConvNeXt has a value for each of its stages."""
    is_vit = hasattr(model, "blocks")
    stages = [model.blocks] if is_vit else [stage.blocks for stage in model.stages]
    return {
        "depth": " / ".join(str(len(blocks)) for blocks in stages),
        "embedding dimension": " / ".join(str(blocks[0].mlp.fc2.out_features) for blocks in stages),
        "number of heads": str(model.blocks[0].attn.num_heads) if is_vit else "-",
        "number of parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
    }


def main(argv: list[str] | None = None) -> None:
    Parser("print_configurations.py", __doc__).parse_args(argv)
    columns = [configuration(create_model(name, device="meta", num_classes=1000)) for name in MODELS.values()]
    print(f"| | {' | '.join(MODELS)} |")
    print("|" + "---|" * (1 + len(MODELS)))
    for row in columns[0]:
        print(f"| {row} | {' | '.join(column[row] for column in columns)} |")
    print(f"\n{NOTE}")


if __name__ == "__main__":
    run_program("print_configurations.py", main)
