"""Files on disk: atomic writes, JSON, CSV, safetensors, locks, links."""
