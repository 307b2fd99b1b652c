"""Tables, plots and pages. This room knows nothing of pruning."""
