"""Remove layers from a model: merge, patch and cut, in memory or from folder to folder."""
