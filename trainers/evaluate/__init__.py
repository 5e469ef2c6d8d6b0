"""Evaluations: what an encoder has learnt, measured through the decode and resize of training."""
