"""The name of tokenised rows in the cache: a digest of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gradpruner.data.encoder import Encoder
from gradpruner.version import __version__


def code_of_room() -> str:
    """Return a digest of the code that reads and tokenises examples.

    Other code may make something else of them.
    """
    code = (path.name.encode() + path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(code)).hexdigest()


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
        code_of_room(),
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

    What a tokenizer does in Python is not known: None. That is one without a Rust backend, or of a class that is not of
    transformers.
    """
    import tokenizers
    import transformers

    backend, kind = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer)
    if backend is None or not hasattr(backend, "to_str") or kind.__module__.partition(".")[0] != "transformers":
        return None
    settings = json.loads(backend.to_str())
    settings.pop("truncation", None)  # of the last call
    settings.pop("padding", None)
    inside = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return [
        f"{kind.__module__}.{kind.__qualname__}",
        inside,
        tokenizer.chat_template,
        bool(getattr(tokenizer, "split_special_tokens", False)),  # not in the settings of the backend
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        transformers.__version__,
        tokenizers.__version__,
    ]
