"""The registered hooks, one class a file."""
