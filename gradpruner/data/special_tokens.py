"""The special tokens that a tokenizer puts around a text."""

from __future__ import annotations

from typing import Any, NamedTuple

from gradpruner.errors import InvalidArgument


class Frame(NamedTuple):
    """The tokens around a text.

    Args:
        prefix: the tokens that the tokenizer itself puts before a text: one, several or none.
        end: the tokens that end an answer: those that the tokenizer puts after a text if its end token is among them,
            otherwise its end token.
    """

    prefix: list[int]
    end: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """Return the frame of a tokenizer. Raises InvalidArgument if it has no end token."""
        if tokenizer.eos_token_id is None:
            raise InvalidArgument("tokenizer has no end token (eos_token), which marks where an answer ends")
        prefix, suffix = around(tokenizer)
        return cls(prefix, suffix if tokenizer.eos_token_id in suffix else [tokenizer.eos_token_id])

    def without_prefix(self, tokens: list[int]) -> list[int]:
        """Return tokens without the prefix, if the text itself begins with it."""
        size = len(self.prefix)
        return tokens[size:] if size and tokens[:size] == self.prefix else tokens

    def without_end(self, tokens: list[int]) -> list[int]:
        """Return tokens without the end, if the text itself ends with it."""
        return tokens[: -len(self.end)] if tokens[-len(self.end) :] == self.end else tokens


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and after a text."""
    framed = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return (framed[:1] if framed[:1] == [tokenizer.bos_token_id] else []), []
