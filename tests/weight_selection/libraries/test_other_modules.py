"""Modules of no library that we know: plain ones, open_clip's, and what is refused."""

import threading

import pytest
import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import VisionTransformer

from architectures import reads
from helpers import assert_same
from proofs import check_consistent, check_hidden, structures
from weight_selection import select_weights
from weight_selection.errors import InputError


class MLP(nn.Module):
    """Hidden layers in a list, and a head."""

    def __init__(self, width, depth, classes=3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, width), *(nn.Linear(width, width) for _ in range(depth - 1))])
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def cnn(width, classes=3):
    """Two convolutions, of which a linear layer reads every place."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(2 * width * 4, 2 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2 * width, classes))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Numbered(nn.Module):
    """Blocks that are attributes, not in a list."""

    def __init__(self, width, depth, operation=lambda x: x):
        super().__init__()
        self.stem, self.head, self.depth, self.operation = nn.Linear(6, width), nn.Linear(width, 3), depth, operation
        for number in range(depth):
            setattr(self, f"block_{number + 1}", Block(width))

    def forward(self, x):
        x = self.stem(x)
        for number in range(self.depth):
            x = getattr(self, f"block_{number + 1}")(x)
        return self.head(self.operation(x))


class Recurrent(nn.Module):
    """Two layers of an LSTM or a GRU; they read each row of features as a sequence."""

    def __init__(self, kind, width):
        super().__init__()
        self.layers, self.head = kind(1, width, 2, batch_first=True), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.layers(x.unsqueeze(2))[0][:, -1])


class Causal(nn.Module):
    """A language model of PyTorch's own layers, with a mask of later tokens and one of padding."""

    def __init__(self, width, heads):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.tokens, self.head = nn.Embedding(11, width), nn.Linear(width, 11)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, ids):
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        return self.head(self.encoder(self.tokens(ids), mask=later, src_key_padding_mask=ids == 10))


class Sinusoids(nn.Module):
    """Positions that are no weights are added to tokens."""

    def __init__(self, width, persistent):
        super().__init__()
        self.tokens, self.block, self.head = nn.Embedding(11, width), Block(width), nn.Linear(width, 3)
        angles = torch.arange(5.0)[:, None] / 100 ** torch.linspace(0, 1, width // 2)
        self.register_buffer("places", torch.cat((angles.sin(), angles.cos()), 1), persistent)

    def forward(self, ids):
        return self.head(self.block(self.tokens(ids) + self.places))


def tower(width, depth):
    return VisionTransformer(16, 8, width, depth, width // 8, 2.0, output_dim=6)


def clip(width, depth):
    both = {"width": width, "layers": depth, "mlp_ratio": 2.0}
    vision = {"image_size": 16, "patch_size": 8, "head_width": 8} | both
    text = {"context_length": 5, "vocab_size": 11, "heads": width // 8} | both
    return CLIP(6, vision, text)


def reads_projections(model, key):
    """As ``reads``; CLIP multiplies by its projections from the right."""
    return 0 if key.split(".")[-1] in ("proj", "text_projection") else reads(model, key)


FEATURES, IMAGES, TOKENS = torch.randn(2, 6).double(), torch.randn(2, 3, 16, 16).double(), torch.arange(10).view(2, 5)
SMALL_IMAGES = torch.randn(2, 3, 8, 8).double()
PAIRS = {  # name: (teacher, student, inputs)
    "mlp": (lambda: MLP(16, 4), lambda: MLP(8, 2), (FEATURES,)),
    "cnn": (lambda: cnn(8), lambda: cnn(4), (SMALL_IMAGES,)),
    "numbered": (lambda: Numbered(16, 3), lambda: Numbered(8, 2), (FEATURES,)),
    "lstm": (lambda: Recurrent(nn.LSTM, 8), lambda: Recurrent(nn.LSTM, 4), (FEATURES,)),
    "gru": (lambda: Recurrent(nn.GRU, 8), lambda: Recurrent(nn.GRU, 4), (FEATURES,)),
    "causal": (lambda: Causal(16, 4), lambda: Causal(8, 2), (torch.arange(10).view(2, 5),)),
    "open_clip_tower": (lambda: tower(32, 3), lambda: tower(16, 2), (IMAGES,)),
    "open_clip": (lambda: clip(32, 3), lambda: clip(16, 2), (IMAGES, TOKENS)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_student_hidden_in_a_teacher_is_found_again_and_keeps_the_same_neurons(name):
    teacher, student, inputs = PAIRS[name]
    teacher, student = teacher(), student()
    both = structures(teacher, student, inputs)

    def output(given):  # CLIP's: features of images and of texts, and the scale of their products
        return given[0] @ given[1].T if isinstance(given, tuple) else given

    check_hidden(teacher, student, both, inputs, name == "mlp", reads_projections, output)
    if name != "mlp":  # its layers have streams of their own
        check_consistent(teacher, both)


def test_sinusoids_are_selected_from_a_buffer_and_refused_if_the_state_dict_lacks_them():
    ids = torch.arange(10).view(2, 5)
    chosen = select_weights(teacher := Sinusoids(16, True), Sinusoids(8, True), example_inputs=ids)
    assert torch.equal(chosen["places"], teacher.places[:, ::2])
    assert torch.equal(chosen["tokens.weight"], teacher.tokens.weight[:, ::2])
    with pytest.raises(InputError, match="tokens.weight, dimension 1: .*such as sinusoids of positions; keep .*buffer"):
        select_weights(Sinusoids(16, False), Sinusoids(8, False), example_inputs=ids)
    projection = {"element_selection": "project", "calibration": [{"ids": ids}]}
    with pytest.raises(InputError, match="can be rotated: numbers that are no weights .*choose greedy"):
        select_weights(Sinusoids(8, False), Sinusoids(8, False), example_inputs=ids, **projection)


def test_hidden_layers_in_a_list_are_chosen_by_the_rule():
    teacher, student = MLP(16, 4), MLP(8, 2)
    chosen = select_weights(teacher, student, example_inputs=FEATURES, layer_selection="last_n")
    assert torch.equal(chosen["layers.0.weight"], teacher.layers[0].weight[::2])
    assert torch.equal(chosen["layers.1.weight"], teacher.layers[3].weight[::2, ::2])


def test_numbered_attributes_are_layers_if_they_have_the_same_tensors():
    chosen = select_weights(
        teacher := Numbered(16, 3), Numbered(16, 2), example_inputs=FEATURES, layer_selection="last_n"
    )
    assert torch.equal(chosen["block_1.up.weight"], teacher.block_2.up.weight)


class Extended(timm.layers.Mlp):
    """A module of a user's that extends a part of timm's models, not a model."""


def test_a_class_that_extends_a_part_of_a_librarys_models_is_any_other_module():
    teacher, student = Extended(6, 16, 3), Extended(6, 8, 3)
    chosen = select_weights(teacher, student, example_inputs=FEATURES)
    assert torch.equal(chosen["fc1.weight"], teacher.fc1.weight[::2])


def test_flattened_places_stay_with_their_channels():
    teacher, student = cnn(8), cnn(4)
    chosen = select_weights(teacher, student, example_inputs=SMALL_IMAGES.float())
    expected = teacher[9].weight.view(16, 16, 4)[::2, ::2].reshape(8, 32)
    assert torch.equal(chosen["9.weight"], expected)


def test_the_layer_that_gives_the_output_is_the_classifier_if_the_outputs_differ():
    teacher = MLP(16, 2)
    assert "head.weight" in select_weights(teacher, MLP(8, 2), example_inputs=FEATURES)
    assert "head.weight" not in select_weights(teacher, MLP(8, 2, classes=5), example_inputs=FEATURES)
    assert "head.weight" not in select_weights(teacher, MLP(8, 2), example_inputs=FEATURES, classifier=("head",))


class Dense(nn.Module):
    """A convolution and a head for each pixel, whose outputs ``last`` may change."""

    def __init__(self, width, head, last=lambda x: x):
        super().__init__()
        self.stem, self.head, self.last = nn.Conv2d(3, width, 3, padding=1), head, last

    def forward(self, x):
        return self.last(self.head(self.stem(x).relu()))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("last", [lambda x: x, lambda x: F.interpolate(x, 16), lambda x: x.mean((2, 3))])
def test_a_convolution_that_gives_the_output_is_the_classifier_if_the_outputs_differ(kind, last):
    teacher, images = Dense(8, kind(8, 5, 1), last), SMALL_IMAGES.float()
    for classes in (3, 7):
        assert select_weights(teacher, Dense(4, kind(4, classes, 1), last), example_inputs=images).keys() == {
            "stem.weight",
            "stem.bias",
        }
    same = Dense(4, kind(4, 5, 1), last)
    for classifier in (None, ()):
        assert "head.weight" in select_weights(teacher, same, example_inputs=images, classifier=classifier)


class Pyramid(nn.Module):
    """Features of two sizes."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, width, 1), nn.Conv2d(width, 7, 3)

    def forward(self, x):
        x = self.stem(x)
        return x, self.next(x)


def test_a_convolution_whose_outputs_others_read_gives_features():
    assert len(select_weights(Pyramid(8), Pyramid(4), example_inputs=SMALL_IMAGES)) == 4


class Keeping(nn.Module):
    """It keeps its last features, and a state beside tensors."""

    def __init__(self, width, kept=None):
        super().__init__()
        self.body, self.head, self.kept = nn.Linear(6, width), nn.Linear(width, 3), kept

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        self.features = [self.body(x).relu()]
        return self.head(self.features[0])


def test_what_a_model_keeps_beside_its_tensors_is_no_matter():
    teacher = Keeping(8)
    teacher(FEATURES.float())
    assert len(select_weights(teacher, Keeping(4), example_inputs=FEATURES)) == 4
    projected = {"element_selection": "greedy", "calibration": [{"x": FEATURES.float()}]}
    assert len(select_weights(teacher, Keeping(4), example_inputs=FEATURES, **projected)) == 4
    assert teacher.features[0].grad_fn is not None


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")])
def test_contexts_of_the_caller_are_no_matter(context):
    teacher, student = cnn(8), cnn(4)
    for projection in ({}, {"element_selection": "greedy", "calibration": SMALL_IMAGES.float()}):
        expected = select_weights(teacher, student, example_inputs=SMALL_IMAGES, **projection)
        with context():
            chosen = select_weights(teacher, student, example_inputs=SMALL_IMAGES, **projection)
        assert_same(chosen, expected)
        assert not any(value.is_inference() for value in chosen.values())


# ---------------------------------------------------------------------------------------------------------
# What is refused, in one line that says what to do


class Two(nn.Module):
    """Two tasks."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.sort, self.colour = nn.Linear(6, 8), nn.Linear(8, classes), nn.Linear(8, classes)

    def forward(self, x):
        x = self.body(x)
        return self.sort(x), self.colour(x)


def with_head(width, classes):
    """A model of timm's with a head that begins with a norm."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, embed_dim=width, num_heads=2, depth=1)
    model.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
    return model


def test_a_head_that_begins_with_a_norm_is_selected_and_its_classes_are_compared():
    chosen = select_weights(teacher := with_head(16, 3), with_head(8, 3), include_head=True)
    assert torch.equal(chosen["head.0.weight"], teacher.head[0].weight[::2])
    assert torch.equal(chosen["head.1.weight"], teacher.head[1].weight[:, ::2])
    with pytest.raises(InputError, match=r"teacher has 3 classes, student 5 \(head.1.weight\)"):
        select_weights(teacher, with_head(8, 5), include_head=True)


def test_a_students_own_head_is_named_where_the_teacher_has_another():
    teacher, student = MLP(8, 2), MLP(8, 2)
    student.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(InputError, match=r"head.weight: .* \(classifier=\('head',\)\)"):
        select_weights(teacher, student, example_inputs=FEATURES)
    assert len(select_weights(teacher, student, example_inputs=FEATURES, classifier=("head",))) == 4


class Sorted(nn.Module):
    def forward(self, x):
        return x.sort().values


class Valued(MLP):
    def forward(self, x):
        features = super().forward(x)
        return features if features.sum() > 0 else -features


class Masked(MLP):
    def forward(self, x, mask):
        return super().forward(x * mask)


class Routed(nn.Module):
    """Experts in a list or in one tensor, and a router of two for each token, which may take those beside them."""

    def __init__(self, experts, width=4, listed=False, shift=0):
        super().__init__()
        self.router, self.shift, self.listed = nn.Linear(width, experts), shift, listed
        each = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))
        self.experts = each if listed else nn.Parameter(torch.randn(experts, width, width))

    def forward(self, x):
        weights, places = self.router(x).softmax(-1).topk(2)
        if self.shift:
            places.add_(self.shift).remainder_(self.router.out_features)
        if not self.listed:
            return x + (weights[..., None] * (x[:, None, None] @ self.experts[places]).squeeze(2)).sum(1)
        gates = [(weights * (places == number)).sum(-1, keepdim=True) for number in range(len(self.experts))]
        return x + sum(gate * expert(x) for gate, expert in zip(gates, self.experts, strict=True))


def test_experts_are_chosen_with_their_rows_of_the_router_or_not_at_all():
    teacher = Routed(6)
    teacher.router.weight.data.copy_(torch.arange(6.0)[:, None].expand(6, 4))
    teacher.experts.data.copy_(torch.arange(6.0)[:, None, None].expand(6, 4, 4))
    weights = select_weights(teacher, Routed(3), example_inputs=torch.zeros(2, 4), classifier=())
    assert weights["router.weight"][:, 0].tolist() == weights["experts"][:, 0, 0].tolist() == [0, 2, 4]
    for options in ({"listed": True}, {"shift": -1}):  # it cannot be seen which row belongs to which expert
        pair = Routed(6, **options), Routed(3, **options)
        with pytest.raises(InputError, match="dimension 0: .*these are positions, not neurons"):
            select_weights(*pair, example_inputs=torch.zeros(2, 4), classifier=())


class Silent:
    """Cannot be copied, and does not say why."""

    def __deepcopy__(self, memo):
        raise TypeError


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


SCRIPT = torch.jit.trace(MLP(8, 1), FEATURES.float())


@pytest.mark.parametrize(
    ("teacher", "student", "options", "message"),
    [
        (Two(3), Two(5), {}, "outputs of several layers differ in size: sort .3 in the teacher, 5 in the student."),
        (MLP(8, 1), cnn(4), {"student_inputs": SMALL_IMAGES}, "the teacher has no "),
        (cnn(8), cnn(4), {}, "in 0: its forward pass of .2, 6. fails .*; give example_inputs"),
        (
            MLP(8, 1),
            MLP(4, 1),
            {"example_inputs": SMALL_IMAGES[..., :5]},
            "in layers.0: .* images fails .*; give example",
        ),
        (Masked(8, 1), Masked(4, 1), {}, "missing 1 required positional argument: 'mask'.*; give example_inputs"),
        (
            MLP(8, 1),
            MLP(4, 1),
            {"exclude": ["attention"]},
            "exclude=attention: mlp has no such component; it has none",
        ),
        (MLP(8, 1), MLP(4, 1), {"example_inputs": None}, "does not say what inputs it takes; give example_inputs"),
        (MLP(8, 1), MLP(4, 1), {"classifier": ("tail",)}, "the student has no such module; its named_modules"),
        (MLP(8, 1), MLP(4, 2), {}, "layers: teacher has 1 layers, student 2"),
        (nn.LazyLinear(3), MLP(4, 1), {}, "weight has no shape yet; run the model once on example inputs"),
        (SCRIPT, MLP(4, 1), {}, "teacher: is a TorchScript program; give the module that it was made from"),
        (SCRIPT, MLP(4, 1), {"example_inputs": None}, "teacher: is a TorchScript program; give the module that it was"),
        (Valued(8, 1), MLP(4, 1), {}, "its forward pass looks at the values of tensors.*[)]$"),
        (Keeping(8, threading.Lock()), Keeping(4), {}, "a Keeping cannot be copied .*lock"),
        (Keeping(8, Silent()), Keeping(4), {}, "a Keeping cannot be copied .TypeError.; give one without"),
        (quantised(MLP(8, 1)), MLP(4, 1), {}, "_packed_params.dtype is no tensor, as in quantised models"),
        (MLP(8, 1), MLP(4, 1), {"example_inputs": None}, r"forward takes \(x first\)"),
        (Numbered(8, 2, lambda x: x.cumsum(1)), Numbered(4, 2), {}, "apart: aten.cumsum.default is no operation"),
    ],
    ids=lambda value: None if isinstance(value, (nn.Module, dict)) else value[:30],
)
def test_what_cannot_be_selected_is_refused_in_one_line(teacher, student, options, message):
    with pytest.raises(InputError, match=message) as refusal:
        select_weights(teacher, student, **{"example_inputs": FEATURES.float()} | options)
    assert "\n" not in str(refusal.value)


def test_an_operation_that_cannot_be_followed_is_named_with_its_module():
    teacher = Numbered(8, 2)
    teacher.block_2.down = nn.Sequential(teacher.block_2.down, nn.Softmax(1), Sorted())
    message = "in block_2.down.2: aten.sort.default is no operation that neurons can be followed through"
    with pytest.raises(InputError, match=message):
        select_weights(teacher, teacher, example_inputs=FEATURES)
