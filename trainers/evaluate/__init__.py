"""Evaluations: what an encoder has learnt, measured through the decode and resize of training.

evaluator    what is measured during a run        knn            nearest neighbours of frozen features
supervised   the loop that learns from labels     learners       what it trains: a head, or all
classifiers  linear probe and fine-tuning         logistic       logistic regression of frozen features
multilabel   images that show several classes     svm            VOC 2007's linear SVMs
transfer     a table over several sets            labelled_sets  the sets that a file names
precision    average precision, accuracies        box_scores     IoU, CorLoc, health of boxes
kept         the folder of one that trains        command        the commands
"""
