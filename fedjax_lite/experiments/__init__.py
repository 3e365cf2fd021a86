"""Whole experiments as values: the settings of a run, and published baselines."""
