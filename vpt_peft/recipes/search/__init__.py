"""Hyperparameter search: the space, trials stored by Optuna, and trials on a cluster by Ray Tune."""
