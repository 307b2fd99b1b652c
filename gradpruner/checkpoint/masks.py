"""Masks: which weights of a model stay, as bits in one file, and how training keeps to them."""

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
PREFIX = "mask of "  # before the names of tensors, so that no program can take a mask for a weight


@dataclass(frozen=True)
class Masks:
    """Masks by parameter name, as the plain model names them.

    bits: uint8 (out, ceil(in / 8)), in host memory; transposed weights are masked as (out, in) too. widths: number of
    inputs. about: how they were made (method, pattern, allocation), for people.
    """

    bits: Mapping[str, Tensor]
    widths: Mapping[str, int]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """Masks of what is not zero in the linears of a model's decoder layers. Raises UnsupportedModel."""
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
        """Share of the masked weights' entries that is zero, 0 to 1."""
        kept = sum(int(unpack(mask, self.widths[name]).sum()) for name, mask in self.bits.items())
        return 1 - kept / sum(len(mask) * self.widths[name] for name, mask in self.bits.items())

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Zero what is masked, in place, under adapters too. Raises ModelMismatch if the weights are others."""
        for weight, mask in self._matched(model):
            ops.apply_mask_(weight, mask.to(weight.device))

    def check(self, model: nn.Module) -> None:
        """Raises ModelMismatch unless the model has these weights, and every masked entry of them is zero."""
        for name, (weight, _) in zip(self.bits, self._matched(model), strict=True):
            self.check_weight(name, weight)

    def check_weight(self, name: str, weight: Tensor) -> None:
        """Raises ModelMismatch unless every masked entry of this weight, (out, in), is zero."""
        mask = self._fitting(name, tuple(weight.shape))
        if bool(weight.detach()[~unpack(mask.to(weight.device), weight.shape[1])].any()):
            raise ModelMismatch(f"{name} has entries that its mask has taken out")

    def of_layers(self, model: nn.Module, kept: Sequence[int]) -> Masks:
        """Masks of the smaller model that only the decoder layers `kept` are left of, under their new numbers.

        A merge keeps to the masks of the layer that it adds to: zero has no sign, so nothing is added to it. A patch
        does not. model: the model before or after the layers were removed. Raises ModelMismatch.
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
        """The bits of a weight of this shape, (out, in). Raises ModelMismatch if they are not."""
        mask = self.bits[name]
        if mask.dtype != torch.uint8 or mask.ndim != 2 or mask.shape[1] != -(-self.widths[name] // 8):
            raise ModelMismatch(f"{name}: its mask is {mask.dtype} of {tuple(mask.shape)}, not bits of its inputs")
        if (len(mask), self.widths[name]) != shape:
            raise ModelMismatch(f"{name} is {shape}; its mask {(len(mask), self.widths[name])}")
        return mask

    def _matched(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        decoder, found = Decoder(model), list[tuple[Tensor, Tensor]]()
        weights = {decoder.path_of(weight): weight for weight in decoder.weights}
        for name in self.bits:
            if name not in weights:
                raise ModelMismatch(f"the model has no weight {name!r}; the masks are another model's")
            stored = decoder.parameter(weights[name]).data
            weight = stored.t() if weights[name].transposed else stored
            if is_packed(decoder.parameter(weights[name])) or is_sharded(decoder.parameter(weights[name])):
                raise UnsupportedModel(f"{name} is quantised or sharded: masks apply to plain weights")
            found.append((weight, self._fitting(name, tuple(weight.shape))))
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, whole or not at all, with checksums. Raises InvalidArgument, CheckpointError.

        Its content is safetensors. Give it another ending where it lies beside weights: servers read every file that
        ends in .safetensors.
        """
        tensors = {PREFIX + name: mask.contiguous() for name, mask in self.bits.items()}
        write_described(path, tensors, {"format": FORMAT, "widths": dict(self.widths), "about": dict(self.about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote. Raises InvalidArgument if there is no file, CheckpointError if it is damaged."""
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
