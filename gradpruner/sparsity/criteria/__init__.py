"""Criteria that decide which single weights are zeroed, each in its own file.

They are registered by name. `gradpruner.sparsity.criteria.base` explains what a criterion is and how to add one.
"""

from gradpruner.sparsity.criteria.base import CRITERIA, Criterion, ImportanceTerms, Metric, parse_criterion, register
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
    "ImportanceTerms",
    "Magnitude",
    "Metric",
    "SparseGpt",
    "Wanda",
    "parse_criterion",
    "register",
]
