"""Figure 5 with its numbers, and the table of configurations."""

import matplotlib.image
import numpy as np
import pytest
import torch

import plot_attention
import print_configurations
from helpers import words, written
from models.initialization import initialize
from weight_selection.cli import main as select_main
from weight_selection.sources.timm_models import create_model

LARGE = {"embed_dim": 64, "num_heads": 2, "depth": 2}
HALF = {"embed_dim": 32, "num_heads": 2, "depth": 2}


def attention(**kwargs):
    torch.manual_seed(0)
    return create_model("vit_tiny", **{**LARGE, **kwargs}).blocks[0].attn


# ---------------------------------------------------------------------------------------------------------
# The products and how diagonal they are


@pytest.mark.parametrize("head", [0, 1])
def test_products_are_those_of_the_head_element_by_element(head):
    layer = attention(embed_dim=12)
    query_key, value_proj = plot_attention.attention_products(layer, head)
    qkv, proj = layer.qkv.weight.tolist(), layer.proj.weight.tolist()
    own = range(6 * head, 6 * head + 6)
    for i in range(12):
        for j in range(12):
            assert query_key[i, j].item() == pytest.approx(sum(qkv[n][i] * qkv[12 + n][j] for n in own), abs=1e-7)
            assert value_proj[i, j].item() == pytest.approx(sum(qkv[24 + n][i] * proj[j][n] for n in own), abs=1e-7)


def test_products_give_the_output_of_attention():
    layer = attention(qkv_bias=False, proj_bias=False)
    tokens = torch.randn(5, 64)
    output = torch.zeros(5, 64)
    for head in range(2):
        query_key, value_proj = plot_attention.attention_products(layer, head)
        logits = tokens @ query_key @ tokens.T / layer.head_dim**0.5
        output += logits.softmax(dim=-1) @ tokens @ value_proj
    torch.testing.assert_close(layer(tokens[None])[0], output)


def test_diagonality_is_high_for_an_identity_and_nothing_for_noise():
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = plot_attention.diagonal_and_rest(3 * torch.eye(64) + noise)
    assert mean == pytest.approx(3, abs=0.5)
    assert std == pytest.approx(1, abs=0.05)
    assert plot_attention.diagonality(noise - 10 * torch.eye(64)) == pytest.approx(-10, abs=0.6)
    assert abs(plot_attention.diagonality(noise)) < 3 / 64**0.5


def test_only_the_block_with_equal_queries_and_keys_is_diagonal():
    torch.manual_seed(0)
    model = create_model("vit_tiny", **LARGE)
    with torch.no_grad():
        q, k, _ = model.blocks[1].attn.qkv.weight.view(3, 64, 64)
        k.copy_(q)
    first, second = (plot_attention.attention_products(block.attn, 0) for block in model.blocks)
    assert plot_attention.diagonality(second[0]) > 3
    assert all(abs(plot_attention.diagonality(product)) < 3 / 64**0.5 for product in (*first, second[1]))


# ---------------------------------------------------------------------------------------------------------
# plot_attention.py


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Directory of teacher.pth, a ViT whose products have diagonals, and of two selections of half its width."""
    directory = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    teacher = create_model("vit_tiny", **LARGE, num_classes=7)
    initialize(teacher, "mimetic")
    torch.save(teacher.state_dict(), directory / "teacher.pth")
    models = ["--pretrained_model", "vit_tiny", "--teacher_kwargs", *words(LARGE)]
    models += ["--student", "vit_tiny", "--student_kwargs", *words(HALF)]
    for rule in ("uniform", "random_inconsistent"):
        chosen = ["--pretrained_path", directory / "teacher.pth", "--element_selection", rule]
        select_main(list(map(str, [*models, *chosen, "--output_dir", directory / rule])))
    return directory


def panel(label, weights, kwargs, model="vit_tiny"):
    return ["--panel", label, model, weights, *words(kwargs)]


def test_figure_and_numbers_say_whether_diagonals_survive(files, tmp_path, cli, capsys):
    png = tmp_path / "figure.png"
    panels = [
        *panel("teacher", files / "teacher.pth", LARGE),
        *panel("selected", files / "uniform", HALF),
        *panel("inconsistent", files / "random_inconsistent" / "vit.pth", HALF),
        *panel("random", "timm", {**HALF, "depth": 1}),
    ]
    assert cli(plot_attention.main, "--output", png, *panels) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"figure: {png}"
    assert [line.split(":")[0] for line in lines if line.startswith("W_")] == ["W_q W_k^T", "W_v W_proj"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[0] == rows[4] == ["block", "teacher", "selected", "inconsistent", "random"]
    for sign, blocks in ((1, rows[2:4]), (-1, rows[6:8])):
        assert [block[0] for block in blocks] == ["0", "1"]
        assert blocks[1][-1] == "-"  # it has no second block
        for _, *cells in blocks:
            teacher, selected, *others = (sign * float(cell.split()[0]) for cell in cells if cell != "-")
            assert selected > 0.5 * teacher > 1
            assert all(abs(other) < 3 / 32**0.5 for other in others)
    whole = matplotlib.image.imread(png)
    assert whole.std() > 0.05
    assert cli(plot_attention.main, "--output", png, *panels, "--crop", 16) is None
    assert not np.array_equal(matplotlib.image.imread(png), whole)


def test_numbers_are_of_every_head(cli, tmp_path, capsys):
    command = ["--output", tmp_path / "x.png", "--seed", 3, *panel("mimetic", "mimetic", LARGE)]
    assert cli(plot_attention.main, *command) is None
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |"))
    layer = plot_attention.load_model("vit_tiny", "mimetic", LARGE, 3, "--panel").blocks[1].attn
    heads = sorted(plot_attention.diagonality(plot_attention.attention_products(layer, head)[0]) for head in range(2))
    assert row == f"| 1 | {sum(heads) / 2:.2f} ({heads[0]:.2f} to {heads[1]:.2f}) |"


def test_what_cannot_be_drawn_is_refused(files, tmp_path, cli):
    def refusal(*options, output="x.png"):
        message = cli(plot_attention.main, "--output", tmp_path / output, *options)
        assert written(tmp_path) == []
        return message

    assert "a ConvNeXt has no self-attention" in refusal(*panel("a", "timm", {}, model="convnext_femto"))
    assert "no such model; did you mean" in refusal(*panel("a", "timm", {}, model="vit_tny"))
    assert (
        refusal(*panel("an a", tmp_path / "x.pth", LARGE))
        == f"--panel 'an a' {tmp_path}/x.pth: no such file or directory; name one with weights"
    )
    assert "does not fit this model" in refusal(*panel("a", files / "uniform", LARGE))
    assert "name another or set its kwargs" in refusal(*panel("a", files / "teacher.pth", HALF))
    assert "write LABEL MODEL WEIGHTS" in refusal("--panel", "a", "vit_tiny")
    assert "--panel depth: write NAME=VALUE" in refusal("--panel", "a", "vit_tiny", "timm", "depth")
    assert "label of its own" in refusal(*panel("a", "timm", LARGE), *panel("a", "xavier", LARGE))
    assert "--crop 0: " in refusal(*panel("a", "timm", LARGE), "--crop", 0)
    assert "must end in one of" in refusal(*panel("a", "timm", LARGE), output="x.mp3")
    assert "cannot fetch its weights" in refusal(*panel("a", "pretrained", {}))


# ---------------------------------------------------------------------------------------------------------
# print_configurations.py


def test_configurations_are_those_of_the_models(capsys):
    print_configurations.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:6] == [
        "| depth | 12 | 2 / 2 / 6 / 2 | 12 | 3 / 3 / 9 / 3 |",
        "| embedding dimension | 192 | 48 / 96 / 192 / 384 | 384 | 96 / 192 / 384 / 768 |",
        "| number of heads | 3 | - | 6 | - |",
        "| number of parameters | 5,717,416 | 5,217,784 | 22,050,664 | 28,589,128 |",
    ]
    assert "ConvNeXt-F and ConvNeXt-T swapped" in lines[-1]
