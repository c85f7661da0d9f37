"""Students of the teacher's own architecture: --width, --depth, --student_kwargs alone; what they cost."""

import json
from fractions import Fraction

import pytest
import timm
import torch
import torch.nn as nn

from helpers import meta, read, words, written
from pairs import VIT
from weight_selection.cli import main as select_main
from weight_selection.cost import multiply_adds, parameter_count
from weight_selection.errors import InputError
from weight_selection.sources.names import arguments_of
from weight_selection.sources.timm_models import create_model
from weight_selection.sources.widths import shown, smaller_arguments

HALF, THIRD = Fraction(1, 2), Fraction(1, 3)
LLAMA_30B = {  # of its published config.json
    "hidden_size": 6656,
    "intermediate_size": 17920,
    "num_attention_heads": 52,
    "num_key_value_heads": 52,
    "num_hidden_layers": 60,
    "head_dim": 128,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize(
    ("arguments", "width", "depth", "expected"),
    [
        (
            LLAMA_30B,
            HALF,
            HALF,
            {
                "hidden_size": 3328,
                "intermediate_size": 8960,
                "num_attention_heads": 26,
                "num_key_value_heads": 26,
                "num_hidden_layers": 30,
            },
        ),
        (LLAMA_30B, None, THIRD, {"num_hidden_layers": 20}),
        (  # one head of keys serves all
            {"hidden_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 1},
            HALF,
            None,
            {"hidden_size": 1024, "num_attention_heads": 4},
        ),
        (  # experts, and keys and values that go through fewer neurons; the number of experts stays
            {
                "hidden_size": 64,
                "num_attention_heads": 4,
                "kv_lora_rank": 16,
                "q_lora_rank": None,
                "n_routed_experts": 8,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
            },
            HALF,
            None,
            {
                "hidden_size": 32,
                "num_attention_heads": 2,
                "kv_lora_rank": 8,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
            },
        ),
        (  # models inside a model
            {"projection_dim": 512, "text_config": {"hidden_size": 512, "num_attention_heads": 8}, "vision_config": {}},
            HALF,
            None,
            {"text_config.hidden_size": 256, "text_config.num_attention_heads": 4},
        ),
        (
            {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
            THIRD,
            HALF,
            {"embed_dim": 32, "depths": [1, 1, 3, 1], "num_heads": [1, 2, 4, 8]},
        ),
        (  # OPT and MobileViT
            {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 32, "neck_hidden_sizes": [16, 32]},
            HALF,
            None,
            {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 16, "neck_hidden_sizes": [8, 16]},
        ),
        ({"d_model": 512, "d_ff": 2048, "num_heads": 8, "d_kv": 64, "n_inner": None}, HALF, None, None),
    ],
)
def test_widths_and_heads_are_scaled_together_and_depths_are_rounded_up(arguments, width, depth, expected):
    expected = expected or {"d_model": 256, "d_ff": 1024, "num_heads": 4}
    assert smaller_arguments(arguments, width, depth) == expected


def test_depths_that_are_not_whole_are_rounded_up():
    assert smaller_arguments({"depths": (3, 3, 9, 3)}, None, HALF) == {"depths": (2, 2, 5, 2)}
    mixed = {"num_hidden_layers": 3, "layer_types": ["local", "full", "local"], "out_indices": [3]}
    fewer = {"num_hidden_layers": 2, "layer_types": ["local", "full"], "out_indices": None}
    assert smaller_arguments(mixed, None, HALF) == fewer
    stages = {"depths": [2, 6], "num_layers": 2, "text_config": {"num_layers": 2}}
    fewer = {"depths": [1, 3], "text_config.num_layers": 1}
    assert smaller_arguments(stages, None, HALF) == fewer
    assert smaller_arguments({"layers": (3, 4, 6, 3)}, None, Fraction(1, 100)) == {"layers": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("arguments", "width", "message"),
    [
        ({"embed_dim": 384, "num_heads": 6}, "0.4", "num_heads 6 becomes 2.4.* nearest .* is 1/3 or 0.5"),
        ({"embed_dim": 192, "num_heads": 3}, "0.1", "num_heads 3 becomes 0.3.* nearest .* is 1/3$"),
        ({"embed_dim": 192, "num_heads": 3}, "0.9", "num_heads 3 becomes 2.7.* nearest .* is 2/3$"),
        ({"embed_dim": 96, "num_heads": 1}, "0.5", "num_heads 1 becomes 0.5.* no width gives whole ones"),
        (
            {"stem_width": 32, "w0": 24, "wa": 27.9, "group_size": 8},
            "0.5",
            "known as a width; it has stem_width=32, w0",
        ),
    ],
)
def test_widths_that_give_no_whole_heads_are_refused_with_the_nearest_that_do(arguments, width, message):
    with pytest.raises(InputError, match=f"^--width {width}: .*{message}"):
        smaller_arguments(arguments, Fraction(width), None)


def test_unknown_depths_are_refused_with_the_arguments_that_there_are():
    with pytest.raises(
        InputError, match="^--depth 1/3: no argument .* is known as a depth; it has cfg=.*student_kwargs"
    ):
        smaller_arguments({"cfg": (64, "M"), "act_layer": nn.ReLU}, None, THIRD)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_small_patch16_dinov3.lvd1689m", {"embed_dim": 192, "num_heads": 3}),
        ("vit_small", {"embed_dim": 192, "num_heads": 3}),
        ("convnext_tiny", {"dims": (48, 96, 192, 384)}),
        ("mobilenetv2_100", {"channel_multiplier": 0.5}),
        ("maxvit_tiny_tf_224", {"embed_dim": (32, 64, 128, 256), "stem_width": 32}),  # of a dataclass of timm's
        ("convit_base", {"num_heads": 8}),  # its embed_dim is that of one head
    ],
)
def test_timms_arguments_are_those_that_a_name_fixes(name, expected):
    assert smaller_arguments(arguments_of(name, {}, "--pretrained_model"), HALF, None) == expected


def test_arguments_that_were_given_are_scaled():
    arguments = arguments_of("mobilenetv2_100", {"channel_multiplier": 0.5}, "--pretrained_model")
    assert smaller_arguments(arguments, HALF, None) == {"channel_multiplier": 0.25}
    arguments = arguments_of(VIT.teacher, VIT.large, "--pretrained_model")
    assert smaller_arguments(arguments, THIRD, None) == {"embed_dim": 16, "num_heads": 1}


def test_channel_multiplier_gives_the_models_that_timm_has_under_another_name():
    ours = create_model("mobilenetv2_100", channel_multiplier=0.5, num_classes=7, device="meta").state_dict()
    timms = create_model("mobilenetv2_050", num_classes=7, device="meta").state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in timms.items()}


def test_a_name_of_timm_is_left_as_it_was():
    before = vars(timm.models.efficientnet).copy()
    create_model("mobilenetv2_100", channel_multiplier=0.5, device="meta")
    assert vars(timm.models.efficientnet) == before


def command(files, *more):
    named = ["--pretrained_model", VIT.teacher, "--teacher_kwargs", *words(VIT.large)]
    return [*named, "--pretrained_path", files["vit"], *more]


def test_a_student_of_half_the_width_and_depth_is_the_one_that_could_be_named(cli, weights, tmp_path):
    large = VIT.large | {"num_heads": 6}
    torch.save(weights["vit"], tmp_path / "teacher.pth")
    named = ["--pretrained_model", VIT.teacher, "--teacher_kwargs", *words(large)]
    named += ["--pretrained_path", tmp_path / "teacher.pth"]
    small = words(large | {"embed_dim": 24, "num_heads": 3, "depth": 2})
    by_name = ["--student", VIT.teacher, "--student_kwargs", *small]
    changed = ["--student_kwargs", "embed_dim=24", "num_heads=3", "depth=2"]
    contents = []
    for number, student in enumerate((["--width", "0.5", "--depth", "1/2"], changed, by_name)):
        assert cli(select_main, *named, *student, "--output_dir", tmp_path / f"{number}.pth") is None
        contents.append((tmp_path / f"{number}.pth").read_bytes())
        content = json.loads((tmp_path / f"{number}.json").read_text())
        assert content["student"] == {
            "name": VIT.teacher,
            "kwargs": large | {"embed_dim": 24, "num_heads": 3, "depth": 2},
        }
    assert contents[0] == contents[1] == contents[2]
    assert read(tmp_path / "0.pth")["pos_embed"].shape[-1] == 24


def test_the_plan_says_what_the_student_is_and_costs(cli, capsys):
    named = ["--pretrained_model", "vit_small_patch16_dinov3.lvd1689m", "--teacher_kwargs", "depth=2"]
    assert cli(select_main, *named, "--width", "0.5", "--dry_run") is None
    student = meta("vit_small_patch16_dinov3", embed_dim=192, num_heads=3, depth=2)
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("student with "))
    assert line.startswith(f"student with depth=2 embed_dim=192 num_heads=3: {parameter_count(student):,} parameters, ")
    assert lines[-1].endswith("nothing written")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--width", "0.5", "--student", "vit_tiny"], ["--width 0.5", "--student says already"]),
        (["--depth", "0.5", "--student_kwargs", "depth=2"], ["--depth 0.5", "--student_kwargs says already"]),
        (["--width", "0.5", "--model_type", "vit"], ["--width 0.5", "--model_type says already"]),
        (["--width", "1.5"], ["--width 1.5", "between 0 and 1"]),
        (["--depth", "0"], ["--depth 0", "between 0 and 1"]),
        (["--width", "half"], ["--width", "half"]),
        (["--width", "1/0"], ["--width", "1/0"]),
        (["--width", "0.5"], ["--width 0.5: num_heads 3 becomes 1.5", "1/3 or 2/3"]),
        ([], ["--student is missing", "--width", "--student_kwargs"]),
    ],
)
def test_students_that_are_not_clear_are_refused(more, named, cli, files, tmp_path):
    message = cli(select_main, *command(files, "--output_dir", tmp_path / "out.pth", *more))
    assert message is not None
    assert all(word in message for word in named), message
    assert written(tmp_path) == []


def test_numbers_are_shown_as_a_user_writes_them():
    assert [shown(Fraction(text)) for text in ("0.5", "1/3", "0.0625", "1.50")] == ["0.5", "1/3", "0.0625", "1.5"]


def test_multiply_adds_are_those_of_matrix_products_and_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
    images = torch.zeros(2, 3, 6, 6)
    assert multiply_adds(model, (images,)) == 2 * (6 * 6 * 8 * 3 * 9 + 8 * 6 * 6 * 5)
    assert multiply_adds(model.to("meta"), {"input": images}) == multiply_adds(model, (images,))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert parameter_count(tied) == 16 + 4 + 4


def test_attention_counts_its_two_products():
    width, tokens, hidden = 192, 197, 768
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    expected = 196 * width * 3 * 16 * 16 + 12 * block + 1000 * width
    assert multiply_adds(meta("vit_tiny"), (torch.zeros(1, 3, 224, 224),)) == expected
