"""The averages of a run: their config, momentum in other units, updates, state and reports."""
