"""Pad rows of tokens to one length, as a training loop wants them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradpruner.errors import InvalidArgument
from gradpruner.model.loss import IGNORED


class Collator:
    """Collate tokenised rows to one batch of tensors.

    Rows are padded on the right with token `pad_id`, to a multiple of 8 tokens. Use it as a Trainer's `data_collator`.

    Args:
        tokenizer: the model's. Its padding token is used, or its end token if it has none. It is not changed.

    Raises:
        InvalidArgument: the tokenizer has neither a padding token nor an end token.
    """

    multiple = 8  # tensor cores want it, and fewer different shapes are compiled

    def __init__(self, tokenizer: Any) -> None:
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if self.pad_id is None:
            raise InvalidArgument("tokenizer has neither a padding token nor an end token")
        self._tokenizer = tokenizer
        self._collate: Any = None  # made at the first batch, because transformers' collator is slow to import

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Pad rows into one batch. Token ids are padded with the padding token, labels with -100.

        Args:
            rows: `input_ids` and `labels` of each row. Its other entries are left out.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 of shape (rows, tokens).
        """
        self._collate = self._collate or self._make_collate()
        inputs = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        return dict(self._collate(inputs, return_tensors="pt"))

    def _make_collate(self) -> Any:
        from transformers import DataCollatorForSeq2Seq

        tokenizer = self._tokenizer
        has_mask = "attention_mask" in tokenizer.model_input_names  # without it, padding makes no mask
        if tokenizer.pad_token_id is None or tokenizer.padding_side != "right" or not has_mask:
            tokenizer = copy.deepcopy(tokenizer)  # a shallow copy shares its special tokens with the user's
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            tokenizer.padding_side = "right"
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=self.multiple, label_pad_token_id=IGNORED)
