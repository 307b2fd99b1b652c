"""Data: read examples, tokenise them, make batches of them."""
