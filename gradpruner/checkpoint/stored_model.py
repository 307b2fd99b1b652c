"""Find out which parameter each stored tensor becomes when transformers loads a folder."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.checkpoint.save import check_loaded, quiet
from gradpruner.errors import CheckpointError, InvalidArgument, UnsupportedModel
from gradpruner.model.config import layer_counts, text_config
from gradpruner.model.decoder import Decoder, Weight, sample_positions
from gradpruner.model.full_precision import WANTED, quantisation_of
from gradpruner.model.load import auto_class, refusing
from gradpruner.storage.links import check_links
from gradpruner.storage.tensor_files import TensorInFile, read_folder

IN_MEMORY = "load the model in memory instead: gradpruner.apply, or a --dtype on the command line"
MOST_WITHOUT_TENSORS = 1000  # layers; those that share everything have no tensors of their own


@dataclass(frozen=True)
class Role:
    """What transformers makes of one stored tensor.

    Args:
        parameter: name of the parameter that it becomes, alone or with others.
        converter: the transformers conversion that makes the parameter from several tensors. None if the tensor becomes
            the parameter as it is.
        pattern: the one of the converter's source patterns that the tensor's name matches.
    """

    parameter: str
    converter: Any = None
    pattern: str | None = None


class StoredModel:
    """The model of a checkpoint folder, without values, and the tensors that are stored.

    The model is built on the meta device, by the transformers class that config.json names.

    Attributes:
        folder: the folder.
        config: its transformers configuration.
        model: the model, on the meta device.
        decoder: the decoder layers of the model.
        stored: every tensor in the folder, by the name it is stored under.
        tensors: those that the model uses.
        unused: the names of the others.
        roles: what becomes of each tensor that is used.
        one_to_one: the tensors that become a parameter as they are, by the parameter's name.

    Args:
        folder: a checkpoint folder.
        trust_remote_code: run Python code from the folder, if the model's class is in it. Default False.

    Raises:
        InvalidArgument: there is no such folder, or no config.json in it.
        CheckpointError: the folder is damaged, a part of the model is missing, or a symbolic link leads out of it.
        UnsupportedModel: the model is quantised, holds adapters, or has a parameter that two tensors are stored for.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        if not (folder / "config.json").is_file():
            raise InvalidArgument(f"source {str(folder)!r} is not a folder with a config.json")
        check_links(folder)
        if (folder / "adapter_config.json").exists():
            raise UnsupportedModel(f"{folder} holds adapters: merge them into the model and save it first")
        self.folder, self.config = folder, config_of(folder, trust_remote_code)
        quantised = quantisation_of(self.config)
        if quantised is not None:
            raise UnsupportedModel(f"{folder} is quantised, stored in {quantised}: {WANTED}")
        self.stored = read_folder(folder)
        _check_sizes(folder, self.config, self.stored)
        kind = _class_of(folder, self.config, trust_remote_code)
        self.model: Any
        self.model, info = load_empty(kind, self.config, self.stored)
        # tensors that the model has no place for are left out, as they are when the model is loaded and saved
        check_loaded(self.model, {**info, "unexpected_keys": ()})
        self.decoder = Decoder(self.model)
        parameters = self.model.state_dict()
        self._dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
        roles = {name: _role(self.model, name, parameters) for name in self.stored}
        self.roles = {name: role for name, role in roles.items() if role.parameter in parameters}
        self.tensors = {name: self.stored[name] for name in self.roles}
        self.unused = sorted(self.stored.keys() - self.roles.keys())
        self.one_to_one: dict[str, TensorInFile] = {}
        self._made_of: dict[str, list[tuple[Role, TensorInFile]]] = {}  # parameters of several stored tensors
        for name, role in self.roles.items():
            if role.converter is not None:
                self._made_of.setdefault(role.parameter, []).append((role, self.stored[name]))
            elif role.parameter in self.one_to_one:
                other = self.one_to_one[role.parameter].name
                raise UnsupportedModel(f"{name!r} and {other!r} are both stored for {role.parameter!r}: {IN_MEMORY}")
            else:
                self.one_to_one[role.parameter] = self.stored[name]

    def loaded_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a stored tensor has once it is loaded.

        Floating-point tensors are loaded in the dtype of the model, others as they are stored.
        """
        stored, loaded = self.tensors[name].dtype, self._dtypes[self.roles[name].parameter]
        return loaded if stored.is_floating_point and loaded.is_floating_point else stored

    def parameter_name(self, weight: Weight) -> str:
        """Return the name in the model of a linear weight of the decoder."""
        return self.decoder.path_of(weight)

    def layer_of(self, name: str) -> int | None:
        """Return the decoder layer that a stored tensor belongs to, or None if it is outside."""
        parameter, head = self.roles[name].parameter, f"{self.decoder.path}."
        return int(parameter.removeprefix(head).split(".")[0]) if parameter.startswith(head) else None

    def renamed(self, name: str, layer: int | None) -> str:
        """Return the name to store a tensor under once its decoder layer has another number.

        A name that lacks only the prefix of the base model gets it, as it does when the model is loaded and saved.

        Args:
            name: the name that it is stored under now.
            layer: the new number of its layer, None for a tensor outside the layers.

        Raises:
            UnsupportedModel: the name does not say the layer.
        """
        role, old, path = self.roles[name], self.layer_of(name), self.decoder.path
        prefix = f"{self.model.base_model_prefix}."
        if role.converter is None and role.parameter == prefix + name:
            name = role.parameter
        heads = {path, path.removeprefix(prefix)}
        matches = [match for head in heads if (match := re.fullmatch(rf"({re.escape(head)}\.)(\d+)(\..+)", name))]
        if layer is None and old is None and not matches:
            return name
        if layer is None or old is None or len(matches) != 1 or int(matches[0][2]) != old:
            raise UnsupportedModel(f"{name!r} does not say its layer as {path}.N does: {IN_MEMORY}")
        return f"{matches[0][1]}{layer}{matches[0][3]}"

    def samples(self, weight: Weight) -> Tensor:
        """Return the values at `sample_positions` of a linear weight, as loading would.

        They are read from the files.

        Raises:
            UnsupportedModel: the weight is made of stored tensors in a way that is not known here.
        """
        name, dtype = self.parameter_name(weight), self.decoder.parameter(weight).dtype
        positions = sample_positions(math.prod(weight.shape))
        if name in self.one_to_one:
            return self.one_to_one[name].read_entries(positions).to(dtype)
        entries = [self._locate_entry(name, weight.shape, position) for position in positions]
        return torch.cat([stored.read_entries([position]).to(dtype) for stored, position in entries])

    def _locate_entry(self, name: str, shape: tuple[int, ...], position: int) -> tuple[TensorInFile, int]:
        """Return the stored tensor that holds an entry of an expert weight, and the position.

        Each expert is stored as one matrix, or as several that are put one below another.
        Raises UnsupportedModel for any other way of making the parameter out of what is stored.
        """
        stacks = _stacks(self._made_of.get(name, []))
        experts, rows, columns = shape if len(shape) == 3 else (0, 0, 0)
        heights = [stack[0].shape[0] for stack in stacks]
        fits = all(
            [s.shape for s in stack] == [(h, columns)] * experts for stack, h in zip(stacks, heights, strict=True)
        )
        if not stacks or not fits or sum(heights) != rows:
            raise UnsupportedModel(f"{name!r} is stored in another form than the model has it: {IN_MEMORY}")
        expert, rest = divmod(position, rows * columns)
        row, column = divmod(rest, columns)
        first_rows = [0, *itertools.accumulate(heights[:-1])]
        part = bisect.bisect_right(first_rows, row) - 1
        return stacks[part][expert], (row - first_rows[part]) * columns + column


def _stacks(parts: list[tuple[Role, TensorInFile]]) -> list[list[TensorInFile]]:
    """Return the stored matrices by source pattern, then by expert.

    The result is empty if more is done to them than to stack them.
    """
    converter = parts[0][0].converter if parts else None
    if converter is None:
        return []
    sources = converter.source_patterns
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    if steps != [("MergeModulelist", 0), ("Concatenate", 1)][: 1 if len(sources) == 1 else 2]:
        return []
    stacks: list[list[TensorInFile]] = [[] for _ in sources]
    for role, stored in parts:
        stacks[sources.index(role.pattern)].append(stored)
    if not all(stacks):
        return []
    return [sorted(stack, key=lambda stored: [int(n) for n in re.findall(r"\d+", stored.name)]) for stack in stacks]


def _role(model: Any, name: str, parameters: dict[str, Tensor]) -> Role:
    """Return what transformers would make of a stored tensor on loading."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    used = model._weight_conversions or []
    converters = [step for step in used if isinstance(step, WeightConverter)]
    renamings = [step for step in used if not isinstance(step, WeightConverter)]
    prefix = model.base_model_prefix
    parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
    if parameter not in parameters and name in parameters:
        parameter, pattern = rename_source_key(name, [], [], prefix, parameters)
    if pattern is None:
        return Role(parameter)
    return Role(parameter, next(step for step in converters if pattern in step.source_patterns), pattern)


def load_empty(kind: Any, config: Any, stored: Mapping[str, TensorInFile]) -> tuple[Any, dict[str, Any]]:
    """Build the model of these stored tensors on the meta device.

    The class gets the names, shapes and dtypes of the tensors and not the files: it would map all of them at once.

    Args:
        kind: the transformers class.
        config: its configuration.
        stored: the tensors, by the name they are stored under.

    Returns:
        The model, and transformers' loading info.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    # in the order in which transformers reads them: without a dtype in the config the first tensor's is that of all
    ordered = sorted(stored.items(), key=lambda item: (item[1].file.name, item[0]))
    empty = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in ordered}
    try:
        with quiet():
            return kind.from_pretrained(
                None,
                config=config,
                state_dict=empty,
                dtype="auto",
                device_map={"": "meta"},
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckpointError(f"the checkpoint does not load: {error}") from error


def _check_sizes(folder: Path, config: Any, stored: Mapping[str, TensorInFile]) -> None:
    """Raise CheckpointError if the config names sizes that no stored tensor bears out.

    This comes before the model is built: a damaged number may cost gigabytes.
    """
    count = max((count for _, count in layer_counts(config)), default=0)
    if count > max(len(stored), MOST_WITHOUT_TENSORS):
        raise CheckpointError(f"{folder}: config.json says {count} decoder layers; it holds {len(stored)} tensors")
    # the table of angles of rotary positions is as wide as a head
    widest = max((size for tensor in stored.values() for size in tensor.shape), default=0)
    for name, value in vars(text_config(config)).items():
        if name.endswith("head_dim") and type(value) is int and value > widest:
            raise CheckpointError(
                f"{folder}: config.json says {name} = {value}; no stored tensor is so wide, the widest has {widest}"
            )


def config_of(folder: Path, trust_remote_code: bool) -> Any:
    """Return a checkpoint folder's transformers configuration.

    Args:
        folder: the folder.
        trust_remote_code: run Python code from the folder, if the config class is in it.

    Raises:
        InvalidArgument: transformers cannot read it.
    """
    from transformers import AutoConfig  # slow to import

    with refusing("model", str(folder), {}):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _class_of(folder: Path, config: Any, trust_remote_code: bool) -> type[nn.Module]:
    """Return the class of the whole model. It may be a classifier or a reward model."""
    with refusing("model", str(folder), {}), torch.device("meta"):
        named = None if trust_remote_code and getattr(config, "auto_map", None) else _named_class(config)
        return named or type(auto_class(config).from_config(config, trust_remote_code=trust_remote_code))


def _named_class(config: Any) -> type[nn.Module] | None:
    """Return the class with a head that the config names, or None."""
    import transformers

    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and getattr(kind, "config_class", None) is type(config):
            headless = transformers.AutoModel._model_mapping.get(type(config), ())
            # a base model is stored for the whole model to be made of
            return None if kind in (headless if isinstance(headless, tuple) else (headless,)) else kind
    return None
