"""The name of the file that marks the folder of a comparison. It imports nothing."""

COMPARISON_SETTINGS = "comparison.json"
