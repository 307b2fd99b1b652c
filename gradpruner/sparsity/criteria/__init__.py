"""Criteria: which single weights go. One file each, registered by name."""

from gradpruner.sparsity.criteria.base import CRITERIA, Criterion, parse_criterion
from gradpruner.sparsity.criteria.dsnot import DsNoT
from gradpruner.sparsity.criteria.gblm import Gblm
from gradpruner.sparsity.criteria.igia import IgiaTimesWeight
from gradpruner.sparsity.criteria.magnitude import Magnitude
from gradpruner.sparsity.criteria.sparsegpt import SparseGpt
from gradpruner.sparsity.criteria.wanda import Wanda

__all__ = [
    "CRITERIA",
    "Criterion",
    "DsNoT",
    "Gblm",
    "IgiaTimesWeight",
    "Magnitude",
    "SparseGpt",
    "Wanda",
    "parse_criterion",
]
