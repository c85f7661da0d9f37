#!/usr/bin/env python3
r"""Draw Figure 5 of the paper: the attention products of ViTs, and measure how diagonal they are in every block.

python scripts/plot_attention.py --output figure05.png \
  --panel "random init" vit_tiny timm \
  --panel "pretrained ViT-S" vit_small_patch16_224.augreg_in21k pretrained \
  --panel "weight selection" vit_tiny init/

With tokens as rows x, head h has the rows q_h, k_h, v_h of timm's fused qkv, each (head_dim, embed_dim), and the
columns p_h of the projection after it, (embed_dim, head_dim). Both products are (embed_dim, embed_dim) matrices:

  W_q W_k^T  = q_h^T k_h    tokens x, y have the attention logit x W_q W_k^T y^T / sqrt(head_dim), biases aside
  W_v W_proj = v_h^T p_h^T  a token x that is attended to adds x W_v W_proj

The figure shows the products of the first head in the first block. The script measures how diagonal a product is by
the mean of its diagonal, divided by the standard deviation of its other elements. For independent random weights this
is 0 ± 1 / sqrt(embed_dim).
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import huggingface_hub
import timm.layers
import torch
import torch.nn as nn
from matplotlib.figure import Figure

import style
from models import SCHEMES
from models.initialization import initialize
from utils import seed_everything
from weight_selection.arguments import Kwargs, Parser, check_kwargs
from weight_selection.errors import InputError, run_program
from weight_selection.files import provenance_path
from weight_selection.sources.initial_weights import find_weights, load_initial
from weight_selection.sources.teachers import read_teacher
from weight_selection.sources.timm_models import create_model
from weight_selection.sources.timm_names import create_pretrained

PRODUCTS = {"W_q W_k^T": r"$W_q\,W_k^\top$", "W_v W_proj": r"$W_v\,W_{\mathrm{proj}}$"}  # as printed, as drawn


class Panels(Kwargs):
    """Collects the ``LABEL MODEL WEIGHTS [K=V ...]`` of each time that the option is given."""

    def __call__(self, parser, namespace, values, option_string=None):
        panels = getattr(namespace, self.dest) or []
        if len(values) < 3:
            parser.error(f"{option_string} {' '.join(values)}: write LABEL MODEL WEIGHTS, then the model's K=V")
        super().__call__(parser, namespace, values[3:], option_string)
        setattr(namespace, self.dest, [*panels, (*values[:3], getattr(namespace, self.dest))])


def load_model(name: str, weights: str, kwargs: dict, seed: int, option: str) -> nn.Module:
    """Create a model with the weights of a panel.

    Args:
        name: a model that ``create_model`` knows.
        weights: one of ``SCHEMES``, which draws them with ``seed``; "pretrained" for those that timm publishes; or a
            path: a file or directory that weight_selection.py wrote, or a file that it would take for a teacher.
        kwargs: the model's arguments.
        seed: the seed of weights that are drawn at random.
        option: the command-line option that names the panel, for errors.

    Raises:
        InputError: the model is unknown, or the weights are missing or belong to another model.
    """
    check_kwargs(kwargs, option, {})
    if weights == "pretrained":
        return create_pretrained(name, kwargs, option, "name a file")
    seed_everything(seed)
    model = create_model(name, option=option, **kwargs)
    if weights in SCHEMES:
        initialize(model, weights)
        return model
    path = find_weights(weights, model, option)
    if provenance_path(path).is_file():
        load_initial(model, path, option)
    else:
        model.reset_classifier(0)  # the file's may be of another size, or absent
        model.load_state_dict(read_teacher(path, model, option)[0])
    return model


def attention_layers(model: nn.Module, option: str) -> list:
    """The self-attention of every block, from the first to the last.

    Raises:
        InputError: the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, timm.layers.Attention)]
    if not layers:
        raise InputError(f"{option}: a {type(model).__name__} has no self-attention like a ViT's; name a ViT")
    return layers


def attention_products(layer: timm.layers.Attention, head: int) -> list:
    """W_q W_k^T and W_v W_proj of a head, each (embed_dim, embed_dim), in the order of ``PRODUCTS``."""
    own = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
    q, k, v = layer.qkv.weight.detach().unflatten(0, (3, -1))[:, own]
    return [q.T @ k, v.T @ layer.proj.weight.detach()[:, own].T]


def diagonal_and_rest(product: torch.Tensor) -> tuple:
    """The mean of a square matrix's diagonal, and the standard deviation of all its other elements."""
    rest = product[~torch.eye(len(product), dtype=torch.bool)]
    return product.diagonal().mean().item(), rest.std().item()


def diagonality(product: torch.Tensor) -> float:
    """The mean of a square matrix's diagonal, in standard deviations of its other elements."""
    mean, std = diagonal_and_rest(product)
    return mean / std


def summary(layer: timm.layers.Attention, product: int) -> str:
    """Mean and range over a layer's heads of how diagonal a product is, as ``0.41 (-0.10 to 0.83)``."""
    values = [diagonality(attention_products(layer, head)[product]) for head in range(layer.num_heads)]
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def print_table(models: dict, product: int) -> None:
    """Print how diagonal a product is, as Markdown: a row per block and a column per model."""
    print(f"{list(PRODUCTS)[product]}: mean of the diagonal / std of the rest, as mean over heads (and range)\n")
    print(f"| block | {' | '.join(models)} |")
    print("|" + "---|" * (1 + len(models)))
    for block in range(max(map(len, models.values()))):
        cells = (summary(layers[block], product) if block < len(layers) else "-" for layers in models.values())
        print(f"| {block} | {' | '.join(cells)} |")
    print()


def draw(models: dict, crop: int | None) -> Figure:
    """The figure, which has a row for each of ``PRODUCTS`` and a column for each model."""
    figure, axes = style.new_images(len(PRODUCTS), len(models))
    for column, (label, layers) in zip(axes.T, models.items(), strict=True):
        column[0].set_title(label)
        for panel, product in zip(column, attention_products(layers[0], 0), strict=True):
            mean, std = diagonal_and_rest(product)
            style.draw_signed(panel, product[:crop, :crop].numpy())
            panel.set_xlabel(f"diagonal {mean:.3g} / rest {std:.3g} = {mean / std:.2f}", fontsize="small")
    for panel, formula in zip(axes[:, 0], PRODUCTS.values(), strict=True):
        panel.set_ylabel(formula if crop is None else f"{formula}, first {crop} dimensions")
    return figure


def get_args_parser() -> Parser:
    parser = Parser("plot_attention.py", __doc__)
    add = parser.add_argument
    add("--output", required=True, metavar="PNG", help="written anew when it exists")
    words = "LABEL MODEL WEIGHTS [K=V ...], once per column. WEIGHTS: drawn at random as by main.py's --init "
    words += f"({', '.join(SCHEMES)}); pretrained (timm's published ones); a file or directory of weight_selection.py; "
    words += "or a teacher's file. K=V: the model's arguments, such as embed_dim=96 num_heads=3"
    add("--panel", required=True, nargs="+", action=Panels, dest="panels", metavar="WORD", help=words)
    add("--crop", type=int, metavar="N", help="draw the first N rows and columns only; the numbers are of all")
    add("--seed", type=int, default=0, help="of weights drawn at random")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    huggingface_hub.utils.logging.set_verbosity_error()  # a page of retries would hide the one line of an error
    if args.crop is not None and args.crop < 1:
        raise InputError(f"--crop {args.crop}: give a number from 1 up")
    models = {}
    for label, name, weights, kwargs in args.panels:
        if label in models:
            raise InputError(f"--panel {label}: give every panel a label of its own")
        option = f"--panel {label!r}"
        models[label] = attention_layers(load_model(name, weights, kwargs, args.seed, option), f"{option} {name}")
    for product in range(len(PRODUCTS)):
        print_table(models, product)
    style.save(draw(models, args.crop), args.output)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    run_program("plot_attention.py", main)
