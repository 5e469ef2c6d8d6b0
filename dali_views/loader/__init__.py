"""Loader: batches of views in exact order.

loader       `ViewLoader`: epochs, resume, iteration
arguments    of the loader: names of devices and dtypes, lists of views
batch        `Batch`: what it hands out; `Stats`: what an epoch cost
quarantine   images that turned out to be unreadable
"""
