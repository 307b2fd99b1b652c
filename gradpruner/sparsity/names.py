"""The names of the sparsity criteria, and where each is defined. Loads nothing else."""

from __future__ import annotations

CRITERION_MODULES = {
    "magnitude": "gradpruner.sparsity.criteria.magnitude",
    "wanda": "gradpruner.sparsity.criteria.wanda",
    "gblm": "gradpruner.sparsity.criteria.gblm",
    "sparsegpt": "gradpruner.sparsity.criteria.sparsegpt",
    "igia": "gradpruner.sparsity.criteria.igia",
    "dsnot": "gradpruner.sparsity.criteria.dsnot",
}
CRITERION_NAMES = tuple(CRITERION_MODULES)
