"""All that a card must show, in one command: `python -m benchmarks.gpu --out FOLDER --budget 540`."""
