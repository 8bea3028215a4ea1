"""When something happens in a run: the hooks, and the loop that evaluates both weights."""
