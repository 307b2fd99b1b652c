"""A plan and a model in, a smaller model out: merge, patch, cut, in memory or from folder to folder."""
