"""Evaluations of a frozen encoder and of what it says about each image."""
