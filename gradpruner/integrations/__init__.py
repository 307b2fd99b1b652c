"""Plugins for programs that make the Trainer themselves."""
