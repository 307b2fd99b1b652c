"""The name of tokenised rows in the cache: a digest of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from gradpruner.data.encoder import Encoder
from gradpruner.version import __version__

FORMAT = 1  # raise it when the same examples become other rows


def rows_key(examples: str, encoder: Encoder) -> str | None:
    """Return the digest of what rows are made from, or None if that is not known.

    Args:
        examples: the fingerprint of the examples.
        encoder: makes rows of them.
    """
    tokenizer = tokenizer_content(encoder.tokenizer)
    if tokenizer is None:
        return None
    parts = [
        FORMAT,
        __version__,
        examples,
        tokenizer,
        encoder.max_length,
        encoder.train_on,
        encoder.too_long,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_content(tokenizer: Any) -> list[Any] | None:
    """Return everything that decides which tokens a tokenizer makes of a text.

    What a tokenizer without a Rust backend does is not known: None.
    """
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    settings = json.loads(backend.to_str())
    settings.pop("truncation", None)  # of the last call
    settings.pop("padding", None)
    inside = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    kind = type(tokenizer)
    return [
        f"{kind.__module__}.{kind.__qualname__}",
        inside,
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        transformers.__version__,
        tokenizers.__version__,
    ]
