"""Data, recipe, fine-tuning, evaluation, the Trainer integration, resuming."""
