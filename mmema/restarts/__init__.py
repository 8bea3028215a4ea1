"""The plan of a run: when a schedule is restarted, and to which values."""
