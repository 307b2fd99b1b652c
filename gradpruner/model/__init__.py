"""What a transformers model is: layers, wrappers, config, hidden states, loss, loading."""
