"""Whole experiments as values: the settings of a run, and published baselines.

A setting that chooses something is an expression, a name or a Python call, looked up in a table of
the functions that there are (`tables`), and never evaluated (`expressions`).
"""

from fedjax_lite.experiments.build import Experiment, experiment

__all__ = ["Experiment", "experiment"]
