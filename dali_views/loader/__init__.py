"""Loader: batches in exact order, resumable, with unreadable images replaced."""
