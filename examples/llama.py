"""A small LLaMA with first weights from a larger one: python examples/llama.py

Both are tiny and random, in the proportions of LLaMA-30B and 7B. For these two, put 30B's files into a directory and
7B's config.json into another. Then this writes a directory that from_pretrained opens, in the memory of 7B:

    weight-selection --pretrained_model transformers:llama-30b --student transformers:llama-7b-config \
        --output_dir llama-7b --format hub

With --dry_run in place of the last line it prints the plan, for which 30B's config.json is enough.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weight_selection import select_weights

# LLaMA-30B: 6656, 17920, 52, 60. LLaMA-7B: 4096, 11008, 32, 32. A head has the same size in both.
large = {"hidden_size": 104, "intermediate_size": 280, "num_attention_heads": 13, "num_hidden_layers": 15}
small = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 8, "num_hidden_layers": 8}
tokens = torch.arange(1, 13)[None]

with tempfile.TemporaryDirectory() as directory:
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **large)).save_pretrained(directory)
    student = LlamaForCausalLM(LlamaConfig(vocab_size=320, **small))
    weights = select_weights(f"transformers:{directory}", student)  # reads one tensor after the other

student.load_state_dict(weights)  # the head of a language model is selected too
print(f"{len(weights)} tensors are selected, {small['hidden_size']} of {large['hidden_size']} neurons of the stream")

# Then train it as ever: here on one sequence of tokens.
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
for step in range(3):
    optimizer.zero_grad()
    loss = student(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
