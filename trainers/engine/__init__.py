"""Engine: ranks, precision, optimisers, schedules, checkpoints and signals."""
