"""Hugging Face's models of language, of speech, and of text with images: proofs, tied tensors, rows of tokens."""

import pytest
import torch
import torch.nn as nn
import transformers

from helpers import assert_same
from proofs import check_consistent, check_hidden, structures
from weight_selection import InputError, select_weights
from weight_selection.cost import multiply_adds
from weight_selection.plan import SelectionOptions, plan_selection
from weight_selection.report import group_lines, layer_lines, summary
from weight_selection.sources.transformers_inputs import TOKENS, example_inputs
from weight_selection.tracing.trace import trace

WORDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
MODERN = {
    "vocab_size": 40,
    "pad_token_id": 0,
    "cls_token_id": 0,
    "sep_token_id": 3,
    "bos_token_id": 0,
    "eos_token_id": 3,
}
TEXT = WORDS | {"max_position_embeddings": 16}


def bert(heads, layers):
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "intermediate_size": 16 * heads}
    return sizes | {"num_hidden_layers": layers}


def distilbert(heads, layers):
    return {"dim": 8 * heads, "n_heads": heads, "n_layers": layers, "hidden_dim": 16 * heads}


def gpt2(heads, layers):
    return {"n_embd": 8 * heads, "n_head": heads, "n_layer": layers}


def llama(heads, layers):  # two queries for each key
    return bert(heads, layers) | {"num_attention_heads": 2 * heads, "num_key_value_heads": heads, "head_dim": 8}


def llama_of_more_queries(heads, layers):  # the teacher has four for each key, the student two
    return llama(heads, layers) | {"num_attention_heads": heads**2}


def gemma_of_one_key(heads, layers):
    return llama(heads, layers) | {"num_key_value_heads": 1}


def qwen3_moe(heads, layers):
    return llama(heads, layers) | {"moe_intermediate_size": 8 * heads}


def deepseek(heads, layers):  # every head has neurons of its own, and some that rotate and that keys share
    sizes = {"kv_lora_rank": 4 * heads, "q_lora_rank": 8 * heads, "num_attention_heads": heads}
    return qwen3_moe(heads, layers) | sizes | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}


def rwkv(heads, layers):
    return {"hidden_size": 8 * heads, "num_hidden_layers": layers, "attention_hidden_size": 8 * heads}


def lfm2(heads, layers):
    return llama(heads, layers) | {"layer_types": ["conv", "full_attention"] * (layers // 2)}


def mamba(heads, layers):
    return {"hidden_size": 8 * heads, "num_hidden_layers": layers, "state_size": 4, "time_step_rank": 2}


def t5(heads, layers):
    depths = {"num_layers": layers, "num_decoder_layers": layers}
    return depths | {"d_model": 8 * heads, "d_kv": 8, "d_ff": 16 * heads, "num_heads": heads}


def whisper(heads, layers):
    sizes = {"layers": layers, "attention_heads": heads, "ffn_dim": 16 * heads}
    return {"d_model": 8 * heads} | {f"{part}_{key}": sizes[key] for part in ("encoder", "decoder") for key in sizes}


def clip(heads, layers):
    images = bert(heads, layers) | {"image_size": 16, "patch_size": 8}
    return {"text_config": bert(heads, layers) | TEXT, "vision_config": images, "projection_dim": 4 * heads}


# name: (class, its config's, values of both, sizes of (heads, layers), heads and layers of the teacher and the student,
# factor of the teacher's logits). A head that is tied reads all neurons of the stream, of which the teacher has twice
# as many. BERT and its like normalise after a branch, so that no values make a layer the identity.
MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", TEXT, bert, (4, 1), (2, 1), 2),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT, bert, (4, 1), (2, 1), 2),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", TEXT, distilbert, (4, 1), (2, 1), 2),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", WORDS | {"n_positions": 16}, gpt2, (4, 2), (2, 1), 2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, llama, (4, 2), (2, 1), 1),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", TEXT | {"tie_word_embeddings": True}, llama, (4, 2), (2, 1), 2),
    "llama_queries": ("LlamaForCausalLM", "LlamaConfig", TEXT, llama_of_more_queries, (4, 2), (2, 1), 1),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT, llama, (4, 2), (2, 1), 1),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", TEXT, llama, (4, 2), (2, 1), 2),
    "gemma_one_key": ("GemmaForCausalLM", "GemmaConfig", TEXT, gemma_of_one_key, (4, 2), (2, 1), 2),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        TEXT | {"query_pre_attn_scalar": 8, "final_logit_softcapping": None},
        llama,
        (4, 2),
        (2, 1),
        2,
    ),
    "llama_to_one_key": ("LlamaForCausalLM", "LlamaConfig", TEXT, llama, (2, 2), (1, 1), 1),
    "phi_queries": ("PhiForCausalLM", "PhiConfig", TEXT, llama_of_more_queries, (4, 2), (2, 1), 1),
    "phi_to_one_key": ("PhiForCausalLM", "PhiConfig", TEXT, llama, (2, 2), (1, 1), 1),  # rotates half of each head
    "phi3_to_one_key": ("Phi3ForCausalLM", "Phi3Config", TEXT, llama, (2, 2), (1, 1), 1),  # queries, keys, values fused
    "qwen3_to_one_key": ("Qwen3ForCausalLM", "Qwen3Config", TEXT, llama, (4, 2), (1, 1), 1),  # keys are normalised
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_local_experts": 4}, llama, (4, 2), (2, 1), 1),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        TEXT | {"num_experts": 4, "num_experts_per_tok": 2},
        qwen3_moe,
        (4, 2),
        (2, 1),
        1,
    ),
    "deepseek": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        TEXT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 0},
        deepseek,
        (4, 2),
        (2, 1),
        1,
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", TEXT | {"num_local_experts": 4}, llama, (4, 2), (2, 1), 1),
    "deberta": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        bert,
        (4, 1),
        (2, 1),
        2,
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", WORDS, mamba, (4, 2), (2, 1), 2),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", MODERN, bert, (4, 2), (2, 2), 2),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", WORDS | {"context_length": 16}, rwkv, (4, 2), (2, 2), 1),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", TEXT, lfm2, (4, 2), (2, 2), 2),
    "t5": ("T5ForConditionalGeneration", "T5Config", WORDS, t5, (4, 2), (2, 1), 2**0.5),  # its logits are / sqrt(width)
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WORDS | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16},
        whisper,
        (4, 2),
        (2, 1),
        2,
    ),
    "clip": ("CLIPModel", "CLIPConfig", {}, clip, (4, 2), (2, 1), 1),
}
KINDS = ["sliding_attention", "full_attention"]
# Others have all that meets in them. The gain of a key's norm meets the neurons of one key, or a head of several.
VARIANTS = {"roberta", "llama_tied", "llama_queries", "phi_queries", "gemma", "gemma2", "qwen3_to_one_key"}


def build(name, both, sizes=None, **changes):
    """A model of a row of MODELS with random weights: ``both`` are its heads and layers."""
    model, config, values, of, *_ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**values | (sizes or of)(*both) | changes)
    config._experts_implementation = "eager"  # other products of experts do not take float64
    return getattr(transformers, model)(config).eval()


def pair(name, **changes):
    """The teacher and the student of a row of MODELS."""
    return tuple(build(name, both, **changes) for both in MODELS[name][4:6])


def inputs_of(model):
    """Random inputs of a model, in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, value in example_inputs(model).items():
        if name.endswith("input_ids"):
            inputs[name] = torch.randint(4, WORDS["vocab_size"], (2, TOKENS), generator=generator)
            inputs[name][:, -1] = WORDS["eos_token_id"]
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[name] = torch.randn(2, *value.shape[1:], dtype=torch.float64, generator=generator)
    return inputs


def logits(given):
    """A model's logits, as far as a bias of its head does not add to them: the steps from token to token."""
    return given.logits_per_image if "logits_per_image" in given else given.logits.diff(dim=1)


@pytest.fixture
def in_double(monkeypatch):
    """Let norms compute in float64. They go to float32 whatever a model's dtype."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def decoder(config, layers, **changes):
    return transformers.AutoModelForCausalLM.from_config(config(**TEXT | llama(2, layers) | changes))


def layers_taken(teacher, student, **options):
    """For each of the student's layers, the number of the teacher's layer that it starts from."""
    key, weights = "model.layers.{}.mlp.up_proj.weight", select_weights(teacher, student, **options)
    theirs = [layer.mlp.up_proj.weight for layer in teacher.model.layers]
    return [
        next(number for number, weight in enumerate(theirs) if weights[key.format(layer)].equal(weight))
        for layer in range(student.config.num_hidden_layers)
    ]


@pytest.mark.parametrize("rule", ["first_n", "uniform", "mid_n", "quadratic", "last_n"])
def test_a_layer_of_sliding_attention_starts_from_its_like_and_so_does_one_of_full_attention(rule):
    teacher, student = (decoder(transformers.Gemma3TextConfig, layers) for layers in (12, 6))
    taken = layers_taken(teacher, student, layer_selection=rule)
    assert [teacher.config.layer_types[number] for number in taken] == student.config.layer_types
    assert taken[:5] == sorted(set(taken[:5])) and taken[5] in (5, 11), "each sixth layer sees all tokens"


def test_a_layer_without_rotations_starts_from_its_like():
    teacher, student = (decoder(transformers.SmolLM3Config, layers) for layers in (8, 4))  # each fourth is one
    assert layers_taken(teacher, student, layer_selection="uniform") == [0, 2, 5, 3]


def test_attention_that_the_teacher_has_too_rarely_is_refused_and_attention_that_it_has_not_starts_from_any():
    alternating, full = (decoder(transformers.Gemma2Config, 4, layer_types=t * 2) for t in (KINDS, KINDS[1:] * 2))
    with pytest.raises(
        InputError, match=r"teacher's layers are of the kinds 2 \+ 2, student's of 4; give both the sam"
    ):
        select_weights(alternating, full)
    student = decoder(transformers.Gemma2Config, 2)
    assert layers_taken(full, student, layer_selection="uniform") == [0, 2]


def test_kinds_of_attention_in_another_order_are_refused():
    teacher, student = (
        decoder(transformers.Gemma2Config, 2 * n, layer_types=KINDS[::s] * n) for n, s in ((2, 1), (1, -1))
    )
    with pytest.raises(
        InputError, match=r"model\.layers: teacher's layers are of the kinds 2 \+ 2, student's of 1 \+ 1"
    ):
        select_weights(teacher, student)


@pytest.mark.parametrize("name", MODELS)
def test_a_hidden_student_is_what_the_teacher_computes_and_all_that_meets_keeps_its_neurons(name, request):
    teacher, student = pair(name)
    if name.startswith("gemma"):  # it multiplies its embedding by the square root of its width
        teacher.model.embed_tokens.embed_scale = student.model.embed_tokens.embed_scale
    both = structures(teacher, student)
    if name not in VARIANTS:
        check_consistent(teacher, both)
    request.getfixturevalue("in_double")
    check_hidden(teacher, student, both, inputs_of(student), output=logits, factor=MODELS[name][6])


def test_a_trace_leaves_the_models_own_attention():
    model = build("llama", (2, 1))
    before = model.config._attn_implementation
    assert before != "eager"
    trace(model, example_inputs(model))
    assert model.config._attn_implementation == before


def test_what_a_causal_model_costs_is_counted_without_running_it():
    model = build("llama", (2, 1))
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    products = 2 * 4 * 8 * TOKENS  # queries with keys and attention with values: 4 heads of 8
    assert multiply_adds(model, example_inputs(model)) == TOKENS * (linear + products)


def test_experts_cost_as_much_as_those_that_a_token_is_sent_to():
    model = build("mixtral", (2, 1))
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    router, experts = 16 * 4, 2 * 3 * 16 * 32  # four experts, two for each token, of three matrices
    products = 2 * 4 * 8 * TOKENS
    assert multiply_adds(model, example_inputs(model)) == TOKENS * (linear + products + router + experts)


# ---------------------------------------------------------------------------------------------------------
# Tied tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def plan_of(teacher, student, **options):
    return plan_selection(*structures(teacher, student), SelectionOptions(**options))


@pytest.mark.parametrize(("of_teacher", "of_student"), [(True, True), (False, True), (True, False), (False, False)])
def test_heads_are_tied_as_the_students_are(of_teacher, of_student):
    teacher = build("llama", (4, 1), tie_word_embeddings=of_teacher)
    student = build("llama", (2, 1), tie_word_embeddings=of_student)
    weights = select_weights(teacher, student)
    missing = student.load_state_dict(weights, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    embedding, head = student.model.embed_tokens.weight, student.lm_head.weight
    assert (embedding is head) == of_student
    assert torch.equal(embedding, teacher.model.embed_tokens.weight[:, ::2])
    assert torch.equal(head, embedding if of_student else teacher.lm_head.weight[:, ::2])
    assert (weights[EMBEDDING] is weights[HEAD]) == of_student
    plan = plan_of(teacher, student)
    assert plan.tied == ({HEAD: EMBEDDING} if of_student else {})
    assert plan.not_taken == ({HEAD: HEAD} if of_student and not of_teacher else {})
    said = "; the teacher's lm_head.weight is not taken: the student's is tied to model.embed_tokens.weight"
    assert summary(plan) == ("11 selected, 1 tied" if of_student else "12 selected") + said * len(plan.not_taken)


def test_weights_of_a_tied_teacher_need_not_have_its_head():  # files of safetensors do not
    teacher, student = pair("llama_tied")
    weights = {key: value for key, value in teacher.state_dict().items() if key != HEAD}
    assert torch.equal(select_weights(teacher, student, weights=weights)[HEAD], weights[EMBEDDING][:, ::2])


def test_all_keys_of_a_tensor_that_t5_has_four_times_go_by_its_shared_embedding():
    teacher, student = pair("t5")
    names = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert plan_of(teacher, student).tied == dict.fromkeys(names, "shared.weight")


# ---------------------------------------------------------------------------------------------------------
# Rows of tokens


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("llama", {"vocab_size": 30}, "model.embed_tokens.weight, dimension 0: teacher's size 40, student's 30: "),
        ("gpt2", {"vocab_size": 30}, "transformer.wte.weight, dimension 0: teacher's size 40, student's 30: "),
        ("gpt2", {"n_positions": 8}, "transformer.wpe.weight, dimension 0: teacher's size 16, student's 8: "),
        ("t5", {"relative_attention_num_buckets": 16}, "attention_bias.weight, dimension 0: teacher's size 32"),
        ("llama", {"head_dim": 4}, "self_attn.q_proj.weight, dimension 0: .* must be the same"),
    ],
)
def test_other_vocabularies_positions_and_heads_are_refused(name, changes, named):
    teacher, student = build(name, MODELS[name][4]), build(name, MODELS[name][5], **changes)
    with pytest.raises(InputError, match=named):
        plan_of(teacher, student)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_may_look_at_the_values_of_its_mask(name):
    teacher, student = pair(name)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert_same(select_weights(teacher, student, example_inputs=inputs), select_weights(teacher, student))


def test_inputs_that_a_trace_cannot_follow_are_not_needed_where_the_library_knows_others():
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")  # without values
    with pytest.raises(InputError, match="looks at the values .*; leave example_inputs out"):
        select_weights(*pair("bert"), example_inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})


class Words(nn.Module):
    """A model of words with a head of its own, and a second one."""

    def __init__(self, width, words=40, outputs=40):
        super().__init__()
        self.embedding, self.body = nn.Embedding(words, width), nn.Linear(width, width)
        self.head, self.task = nn.Linear(width, outputs, bias=False), nn.Linear(width, 2)

    def forward(self, tokens):
        features = self.body(self.embedding(tokens))
        return self.head(features), self.task(features)


@pytest.mark.parametrize("classifier", [None, (), ("task",)])
def test_rows_of_an_untied_head_are_tokens(classifier):
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    teacher, student = Words(8), Words(4)
    weights = select_weights(teacher, student, example_inputs=tokens, classifier=classifier)
    assert torch.equal(weights["head.weight"], teacher.head.weight[:, ::2])
    assert ("task.weight" in weights) == (classifier != ("task",))
    if classifier is not None:  # otherwise the head is taken to be the task's
        with pytest.raises(InputError, match="head"):
            select_weights(teacher, Words(4, outputs=20), example_inputs=tokens, classifier=classifier)


def test_a_tied_head_is_no_classifier_by_itself():
    teacher, student = pair("llama_tied")
    with pytest.raises(InputError, match="lm_head.weight is of the classifier, but it is the tensor of model.embed"):
        select_weights(teacher, student, classifier=("lm_head",))
    weights = select_weights(*pair("llama"), classifier=("lm_head",))
    assert HEAD not in weights and EMBEDDING in weights


@pytest.mark.parametrize("method", ["uniform", "random", "l1"])
def test_query_heads_are_those_whose_results_are_read(method):
    teacher, student = build("gemma_one_key", (6, 1)), build("gemma_one_key", (4, 1))
    for layer in teacher.model.layers:  # every value says of which head it is
        rows = layer.self_attn.q_proj.weight.data.view(12, 8, -1)
        columns = layer.self_attn.o_proj.weight.data.view(-1, 12, 8)
        rows.copy_(torch.arange(12.0).view(12, 1, 1).expand_as(rows) + 1)
        columns.copy_(torch.arange(12.0).view(1, 12, 1).expand_as(columns) + 1)
    weights = select_weights(teacher, student, element_selection=method)
    rows = weights["model.layers.0.self_attn.q_proj.weight"].view(8, 8, -1)
    columns = weights["model.layers.0.self_attn.o_proj.weight"].view(-1, 8, 8)
    assert len(rows.unique()) == len(columns.unique()) == 8
    if method != "l1":  # which chooses in every tensor by itself
        assert torch.equal(rows[:, 0, 0], columns[0, :, 0])


@pytest.mark.parametrize("method", ["uniform", "random"])
def test_experts_are_those_that_their_router_sends_tokens_to(method):
    teacher, student = (build("mixtral", (heads, 1), num_local_experts=count) for heads, count in ((4, 6), (2, 3)))
    for value in teacher.model.layers[0].mlp.parameters():  # every value says of which expert it is
        value.data.copy_(torch.arange(6.0).view(6, *[1] * (value.ndim - 1)).expand_as(value))
    weights = select_weights(teacher, student, element_selection=method)
    found = {key: value for key, value in weights.items() if ".mlp." in key}
    assert len(found) == 3 and len({tuple(value.flatten(1).mean(1).tolist()) for value in found.values()}) == 1
    assert all(len(value.unique()) == 3 for value in found.values())


@pytest.mark.parametrize("heads", [{"num_attention_heads": 8}, {"num_key_value_heads": 1}])
def test_keys_for_more_queries_are_refused_with_the_number_that_would_do(heads):
    with pytest.raises(InputError, match="q_proj.weight, .*as many queries for each key as the teacher has, or fewer"):
        select_weights(build("llama", (4, 1)), build("llama", (2, 1), **heads))


# ---------------------------------------------------------------------------------------------------------
# A plan of two configs


def test_a_deep_llama_is_planned_from_configs_alone():
    def skeleton(heads, layers):
        with torch.device("meta"):
            return build("llama", (heads, layers))

    teacher, student = skeleton(13, 5), skeleton(8, 3)
    both = structures(teacher, student)
    plan = plan_selection(*both, SelectionOptions(layer_selection="uniform"))
    assert group_lines(plan) == [
        "stream: 104 -> 64, uniform, in 30 tensors",
        "model.layers.{0..2}.self_attn: 13x4 -> 8x4, uniform, in 2 tensors each",
        "model.layers.{0..2}.self_attn: 104 -> 64, uniform, in 2 tensors each",
        "model.layers.{0..2}.mlp: 208 -> 128, uniform, in 3 tensors each",
    ]
    assert layer_lines(plan, both[0].layers, both[1].layers) == ["model.layers.{0..2} from 0, 2, 4"]
