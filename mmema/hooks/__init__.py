"""The registered hooks."""
