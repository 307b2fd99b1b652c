"""What a trained model of a comparison is scored on."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

from gradpruner.compare.scoring import tested as scores_of
from gradpruner.data.examples import Example
from gradpruner.run.job import Job


def test_examples_that_were_skipped_are_not_counted():
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    examples = [Example("q", "a"), Example("q" * 80, "a"), Example("r", "b")]
    for train_on in ("answer", "all"):
        scores = scores_of(
            model, tokenizer, examples, Job("model", 4, max_length=32, train_on=train_on, too_long="skip")
        )
        assert scores["examples"] == len(scores["right"]) == 2
