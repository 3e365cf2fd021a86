"""How a cohort runs: who takes part, in which lanes and waves, and what clients keep.

One compiled program for a whole round. What a client computes, and what the server does with it,
comes from the algorithm.
"""

from fedjax_lite.engine.cohorts import cohort, cohort_of
from fedjax_lite.engine.file_store import FileStore, store_in_file
from fedjax_lite.engine.lanes import TunedLanes, tune_lanes
from fedjax_lite.engine.streaming import prefetch

__all__ = [
    "FileStore",
    "TunedLanes",
    "cohort",
    "cohort_of",
    "prefetch",
    "store_in_file",
    "tune_lanes",
]
