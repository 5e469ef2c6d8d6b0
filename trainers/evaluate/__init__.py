"""Evaluations: what an encoder has learnt, measured through the decode and resize of training.

evaluator    what is measured during a run        knn         nearest neighbours of frozen features
supervised   the loop that learns from labels     learners    what it trains: a head, or all
classifiers  linear probe and fine-tuning         box_scores  IoU, CorLoc, health of boxes
"""
