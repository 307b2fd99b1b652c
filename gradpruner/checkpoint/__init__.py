"""A pruned model on disk and on the hub: save, verify, card, upload."""
