"""Inference over data sets: prediction, evaluation, ranking."""
