"""Regions: what the model has said about each sample: boxes, weights, a partner."""
