"""A network over a data set: prediction, evaluation, ranking."""
