"""Tables, plots and pages. Nothing here depends on pruning."""
