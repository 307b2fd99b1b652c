"""Which weights of a model stay: masks as bits in one file, and training that keeps them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner import ops
from gradpruner.checkpoint.mask_bits import pack, unpack
from gradpruner.distributed.sharding import is_sharded
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch, UnsupportedModel
from gradpruner.model.decoder import Decoder, is_packed
from gradpruner.storage.checked_tensors import read_checked, read_described, write_described

FORMAT = "gradpruner.masks/2"
PREFIX = "mask of "  # before the name of every tensor, so that no program takes a mask for a weight


@dataclass(frozen=True)
class Masks:
    """The masks of a model's linear weights, by parameter name as the plain model has it.

    Args:
        bits: one bit per entry, uint8 (out, ceil(in / 8)), in host memory. A set bit is an entry that stays. Weights
            that are stored transposed are masked as (out, in) too.
        widths: the number of inputs of each weight.
        about: how they were made (method, pattern, allocation). It is only for people to read.
    """

    bits: Mapping[str, Tensor]
    widths: Mapping[str, int]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """Return masks that keep exactly the entries that are not zero now.

        Args:
            model: a transformers or PEFT model. The linear weights of its decoder layers get masks.

        Returns:
            One mask per linear weight.

        Raises:
            UnsupportedModel: a weight holds several experts in one tensor.
        """
        decoder, bits, widths = Decoder(model), dict[str, Tensor](), dict[str, int]()
        for weight in decoder.weights:
            stored = decoder.parameter(weight).detach()
            if stored.ndim != 2:
                raise UnsupportedModel(f"{decoder.path_of(weight)} holds several experts in one tensor")
            matrix = stored.t() if weight.transposed else stored
            bits[decoder.path_of(weight)] = pack(matrix != 0).cpu()
            widths[decoder.path_of(weight)] = matrix.shape[1]
        return cls(bits, widths)

    def sparsity(self) -> float:
        """Return the share of the masked weights' entries that is zero.

        Returns:
            0 (all entries stay) to 1.
        """
        kept = sum(int(unpack(mask, self.widths[name]).sum()) for name, mask in self.bits.items())
        return 1 - kept / sum(len(mask) * self.widths[name] for name, mask in self.bits.items())

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set every masked entry to zero, in place, under adapters too.

        Args:
            model: the model that the masks are of.

        Raises:
            ModelMismatch: the model has other weights.
            UnsupportedModel: a weight is quantised or sharded.
        """
        for weight, mask in self._matched(model):
            ops.apply_mask_(weight, mask.to(weight.device))

    def check(self, model: nn.Module) -> None:
        """Check that the model has these weights, and that every entry that the masks zero is zero.

        Args:
            model: the model that the masks are of.

        Raises:
            ModelMismatch: it has other weights, or a masked entry is not zero.
            UnsupportedModel: a weight is quantised or sharded.
        """
        for name, (weight, _) in zip(self.bits, self._matched(model), strict=True):
            self.check_weight(name, weight)

    def check_weight(self, name: str, weight: Tensor) -> None:
        """Check that every masked entry of one weight is zero.

        Args:
            name: the parameter's name.
            weight: its values, (out, in).

        Raises:
            ModelMismatch: the mask has another shape, or a masked entry is not zero.
        """
        mask = self._fitting(name, tuple(weight.shape))
        if bool(weight.detach()[~unpack(mask.to(weight.device), weight.shape[1])].any()):
            raise ModelMismatch(f"{name} has entries that its mask has taken out")

    def of_layers(self, model: nn.Module, kept: Sequence[int]) -> Masks:
        """Return the masks of a model that has lost layers, under the layers' new numbers.

        The masks are also right after a merge, which adds nothing to an entry that is zero, because zero has no sign.
        They are not right after a patch.

        Args:
            model: the model before or after the layers were removed.
            kept: the layers that are left, by their old numbers, ascending.

        Returns:
            The masks of the layers that are left.

        Raises:
            ModelMismatch: the masks are another model's.
        """
        new = {f"{Decoder(model).path}.{old}.": f"{Decoder(model).path}.{i}." for i, old in enumerate(kept)}
        renamed = {}
        for name in self.bits:
            match = re.match(rf"{re.escape(Decoder(model).path)}\.\d+\.", name)
            if match is None:
                raise ModelMismatch(f"the model has no weight {name!r}; the masks are another model's")
            if match[0] in new:
                renamed[name] = new[match[0]] + name.removeprefix(match[0])
        bits = {renamed[name]: mask for name, mask in self.bits.items() if name in renamed}
        return Masks(bits, {renamed[name]: self.widths[name] for name in renamed}, self.about)

    def _fitting(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the bits of a weight, (out, in). Raises ModelMismatch if they do not fit it."""
        mask = self.bits[name]
        if mask.dtype != torch.uint8 or mask.ndim != 2 or mask.shape[1] != -(-self.widths[name] // 8):
            raise ModelMismatch(f"{name}: its mask is {mask.dtype} of {tuple(mask.shape)}, not bits of its inputs")
        if (len(mask), self.widths[name]) != shape:
            raise ModelMismatch(f"{name} is {shape}; its mask {(len(mask), self.widths[name])}")
        return mask

    def _matched(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return every masked weight of the model, (out, in), with its bits."""
        decoder, pairs = Decoder(model), list[tuple[Tensor, Tensor]]()
        weights = {decoder.path_of(weight): weight for weight in decoder.weights}
        for name in self.bits:
            if name not in weights:
                raise ModelMismatch(f"the model has no weight {name!r}; the masks are another model's")
            stored = decoder.parameter(weights[name]).data
            weight = stored.t() if weights[name].transposed else stored
            if is_packed(decoder.parameter(weights[name])) or is_sharded(decoder.parameter(weights[name])):
                raise UnsupportedModel(f"{name} is quantised or sharded: masks apply to plain weights")
            pairs.append((weight, self._fitting(name, tuple(weight.shape))))
        return pairs

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, atomically and with checksums.

        The content is safetensors. Give the file another ending where it lies beside weights: servers read every file
        that ends in .safetensors.

        Args:
            path: the file.

        Raises:
            InvalidArgument: the folder does not exist.
            CheckpointError: the file cannot be written.
        """
        tensors = {PREFIX + name: mask.contiguous() for name, mask in self.bits.items()}
        write_described(path, tensors, {"format": FORMAT, "widths": dict(self.widths), "about": dict(self.about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            The masks, in host memory.

        Raises:
            InvalidArgument: there is no such file.
            CheckpointError: it is damaged.
        """
        if not Path(path).is_file():
            raise InvalidArgument(f"masks file {str(path)!r} does not exist")
        prefixed, header = read_described(Path(path), "masks", FORMAT)
        stored = {name.removeprefix(PREFIX): mask for name, mask in prefixed.items() if name.startswith(PREFIX)}
        widths: Any = header.get("widths")
        about: Any = header.get("about")
        described = isinstance(widths, dict) and isinstance(about, dict)
        if not described or len(stored) != len(prefixed) or widths.keys() != stored.keys():
            raise CheckpointError(f"{path} is corrupted: expected a width of each mask, and how they were made")
        for name, mask in stored.items():
            width = widths[name]
            bits = type(width) is int and width > 0 and mask.shape[1:] == (-(-width // 8),)
            if not bits or mask.dtype != torch.uint8:
                raise CheckpointError(f"{path} is corrupted: {name!r} is not a mask of a weight with {width} inputs")
        return cls({name: read_checked(mask, header["crc32"]) for name, mask in stored.items()}, widths, about)
