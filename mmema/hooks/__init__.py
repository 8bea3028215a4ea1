"""The registered hooks, and the parts of EMAHook."""
