"""Floating-point operations of a training step, counted."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from gradpruner.compare.operations import training_operations


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_operations_of_experts_are_counted(experts):
    from transformers import MixtralConfig

    torch.manual_seed(0)
    hidden, inner, vocabulary, rows, tokens, top = 16, 24, 61, 2, 8, 2
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=top,
        experts_implementation=experts,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, vocabulary, (rows, tokens))
    found = training_operations(model, {"input_ids": ids, "labels": ids})
    matrices = 4 * hidden * hidden + hidden * 4 + top * 3 * hidden * inner + hidden * vocabulary
    attention = 2 * rows * tokens * tokens * hidden * 2
    assert found == pytest.approx(3 * (2 * rows * tokens * matrices + attention), rel=0.01)
    assert model.config._experts_implementation == experts


def test_operations_of_attention_that_torch_does_not_see(home):
    """A kernel of somebody else's is replaced while the step is counted."""
    from transformers import AttentionInterface

    def unseen(*args, **options):
        pytest.fail("an attention that is not counted")

    AttentionInterface.register("unseen", unseen)
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    ids = torch.arange(20).reshape(2, 10)
    wanted = training_operations(model, {"input_ids": ids, "labels": ids})
    model.set_attn_implementation("unseen")
    assert training_operations(model, {"input_ids": ids, "labels": ids}) == wanted
    assert model.config._attn_implementation == "unseen"
