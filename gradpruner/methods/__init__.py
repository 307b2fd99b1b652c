"""Ways to remove decoder layers, each in a file of its own, registered by name, all with the same corridor."""

from gradpruner.methods.base import METHODS, Clues, Method, parse_method, register, spelled
from gradpruner.methods.block import Block
from gradpruner.methods.drop_last import DropLast
from gradpruner.methods.grad_pruner import GradPruner
from gradpruner.methods.held_out_loss import HeldOutLoss
from gradpruner.methods.laco import Laco
from gradpruner.methods.magnitude import Magnitude
from gradpruner.methods.random_layers import RandomLayers
from gradpruner.methods.short_gpt import ShortGpt
from gradpruner.methods.sparse import Sparse
from gradpruner.methods.taylor import Taylor

__all__ = [
    "METHODS",
    "Block",
    "Clues",
    "DropLast",
    "GradPruner",
    "HeldOutLoss",
    "Laco",
    "Magnitude",
    "Method",
    "RandomLayers",
    "ShortGpt",
    "Sparse",
    "Taylor",
    "parse_method",
    "register",
    "spelled",
]
