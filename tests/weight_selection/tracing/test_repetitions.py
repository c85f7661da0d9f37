"""Masks that all heads share, and biases that they do not."""

import pytest
import torch
import torch.nn as nn

from proofs import check_consistent, check_hidden, structures
from weight_selection.errors import InputError

BATCH, TOKENS, HEAD = 3, 5, 4


class Attention(nn.Module):
    """An attention whose batches and heads are one dimension; ``mask`` makes (batch x heads, 1 or tokens, tokens)."""

    def __init__(self, heads, mask):
        super().__init__()
        width = heads * HEAD
        self.heads, self.mask = heads, mask
        self.stem, self.qkv, self.out = nn.Linear(6, width), nn.Linear(width, 3 * width), nn.Linear(width, 2)

    def forward(self, x, seen):
        x = self.qkv(self.stem(x)).unflatten(2, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        q, k, v = x.flatten(1, 2)
        scores = self.mask(q @ k.transpose(1, 2), seen, self.heads).softmax(2)
        return self.out((scores @ v).unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))


def expanded(scores, seen, heads):
    mask = seen[:, None, None].expand(-1, heads, TOKENS, -1).reshape(scores.shape)
    return scores.masked_fill(~mask, -torch.inf)


def repeated(scores, seen, heads):
    return scores + (1 - seen.to(scores.dtype)).repeat_interleave(heads, 0)[:, None] * -1e9


def written_into(scores, seen, heads):
    mask = torch.zeros_like(seen, dtype=scores.dtype).masked_fill_(~seen, -torch.inf)
    return torch.where(
        seen.repeat(1, heads).view(-1, 1, TOKENS), scores, scores + mask.repeat_interleave(heads, 0)[:, None]
    )


def of_many_steps(scores, seen, heads):
    mask = seen.to(scores.dtype)
    for _ in range(60):  # each step uses the one before twice
        mask = mask * mask
    return scores + mask.repeat_interleave(heads, 0)[:, None]


def slopes(scores, seen, heads):
    """As in ALiBi: another number for each head, times the positions."""
    positions = torch.arange(TOKENS) * 2.0 ** -torch.arange(heads)[:, None, None]
    return scores + positions.repeat(BATCH, 1, 1).to(scores)


def inputs():
    seen = torch.arange(TOKENS) < torch.tensor([[2], [5], [3]])
    return torch.randn(BATCH, TOKENS, 6, dtype=torch.float64), seen


@pytest.mark.parametrize("mask", [expanded, repeated, written_into, of_many_steps])
def test_a_student_has_fewer_heads_where_all_of_them_get_the_same_mask(mask):
    teacher, student = Attention(4, mask), Attention(2, mask)
    both = structures(teacher, student, given := inputs())
    check_hidden(teacher, student, both, given)
    check_consistent(teacher, both)


def test_numbers_that_differ_from_head_to_head_fix_the_number_of_heads():
    both = structures(teacher := Attention(4, slopes), Attention(2, slopes), inputs())
    with pytest.raises(InputError, match="qkv.weight, dimension 0: .* 4 and 2 are positions, constants"):
        check_consistent(teacher, both)
