"""Averages decided after a training: restarts, horizons and means from stored checkpoints."""
