"""Refusals are counted by their kind."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import coverage
from weight_selection.errors import InputError
from weight_selection.plan import make_plan


def llama(width, heads, key_heads):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, intermediate_size=16, num_hidden_layers=1, **sizes))


def test_every_refusal_has_a_kind():
    with pytest.raises(InputError) as refused:
        make_plan(llama(32, 8, 4), llama(16, 4, 1))
    assert coverage.reason_of(str(refused.value)) == "neurons in other parts or blocks"
    assert coverage.reason_of("anything else") == "another reason"
