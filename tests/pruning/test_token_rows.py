"""Batches that are padded, packed and padding-free: their tokens and sequences, and the patches that come of them."""

from __future__ import annotations

import torch
from training_runs import LAYERS, llama

from gradpruner.plan import Plan
from gradpruner.pruning.patch import fit_patches
from gradpruner.pruning.token_rows import tokens_and_sequences


def found(rows, tokens, **batch):
    real, sequence = tokens_and_sequences(batch, torch.empty(rows, tokens, 3))
    return real.int().tolist(), sequence.tolist()


def test_every_row_is_a_sequence():
    assert found(2, 3) == ([[1, 1, 1]] * 2, [[0, 0, 0], [1, 1, 1]])
    assert found(2, 3, attention_mask=torch.tensor([[1, 1, 0], [0, 1, 1]])) == (
        [[1, 1, 0], [0, 1, 1]],
        [[0, 0, 0], [1, 1, 1]],
    )
    plain = torch.arange(3).expand(2, 3)
    assert found(2, 3, position_ids=plain) == ([[1, 1, 1]] * 2, [[0, 0, 0], [1, 1, 1]])


def test_positions_that_begin_again_are_sequences():
    positions = torch.tensor([[0, 1, 2, 0, 1], [2, 3, 0, 1, 2]])  # the second row goes on with what was cut before
    assert found(2, 5, position_ids=positions) == ([[1] * 5] * 2, [[0, 0, 0, 1, 1], [2, 2, 3, 3, 3]])


def test_the_padding_of_a_padding_free_batch_does_not_count():
    positions = torch.tensor([[0, 1, 0, 1, 2, 0, 0]])
    real, sequence = found(1, 7, position_ids=positions)
    assert real == [[1, 1, 1, 1, 1, 0, 0]] and sequence[0][:5] == [0, 0, 1, 1, 1]


def test_positions_of_several_axes_tell_nothing():
    assert found(1, 3, position_ids=torch.zeros(3, 1, 3, dtype=torch.long)) == ([[1, 1, 1]], [[0, 0, 0]])


def test_a_mask_that_counts_sequences():
    mask = torch.tensor([[1, 1, 2, 2, 2, 3, 0]])
    assert found(1, 7, attention_mask=mask) == ([[1, 1, 1, 1, 1, 1, 0]], [[0, 0, 1, 1, 1, 2, 3]])


def test_a_mask_with_a_row_for_each_query():
    seen = torch.tril(torch.ones(3, 3, dtype=torch.bool)) & torch.tensor([True, True, False])
    assert found(1, 3, attention_mask=seen[None, None])[0] == [[1, 1, 0]]
    floats = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    assert found(1, 3, attention_mask=floats[None, None])[0] == [[1, 1, 0]]


def test_a_padding_free_batch_gives_the_patches_of_the_padded_one():
    model, plan = llama(), Plan(LAYERS, [2, 3, 5])
    generator = torch.Generator().manual_seed(3)
    padded, flat = [], []
    for _ in range(4):
        lengths = [7, 3, 9, 5, 8, 4]
        rows = [torch.randint(0, 61, (length,), generator=generator) for length in lengths]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        padded.append({"input_ids": ids, "attention_mask": mask})
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        lengthwise = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
        positions = torch.cat([torch.arange(length) for length in lengths])
        flat.append({"input_ids": torch.cat(rows)[None], "position_ids": positions[None], **lengthwise})
    expected, patches = fit_patches(model, plan, padded), fit_patches(model, plan, flat)
    assert [p.weight for p in patches] == [p.weight for p in expected] and len(patches) == 2
    for patch, other in zip(patches, expected, strict=True):
        assert abs(patch.unexplained - other.unexplained) < 1e-4
        assert torch.allclose(patch.change, other.change, atol=1e-4)
