"""EMA state on disk."""
