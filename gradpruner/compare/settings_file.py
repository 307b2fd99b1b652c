"""What the command line must know of a comparison. This module imports nothing."""

COMPARISON_SETTINGS = "comparison.json"  # the file that marks the folder of a comparison
HELD_OUT = 48  # training examples that nothing is trained on, for methods that try cuts
