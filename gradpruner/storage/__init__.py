"""Bytes on disk: files written whole or not at all, JSON, safetensors, locks."""
