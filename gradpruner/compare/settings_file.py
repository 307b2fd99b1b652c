"""The file by which a folder is known to hold a comparison. Importing this module costs nothing."""

COMPARISON_SETTINGS = "comparison.json"
