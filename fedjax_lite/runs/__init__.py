"""The driver: loops of rounds, with what they record and where they can be taken up again.

One training run or a sweep of many; checkpoints, rows, pictures, rules that end a run.
"""

from fedjax_lite.runs.checkpoint import Checkpoints, load_state
from fedjax_lite.runs.ledger import NonFiniteWarning
from fedjax_lite.runs.reading import read_runs
from fedjax_lite.runs.records import Recorder
from fedjax_lite.runs.result import InterruptedTraining, TrainResult
from fedjax_lite.runs.stopping import History
from fedjax_lite.runs.sweep import SweepResult, sweep
from fedjax_lite.runs.train import train

__all__ = [
    "Checkpoints",
    "History",
    "InterruptedTraining",
    "NonFiniteWarning",
    "Recorder",
    "SweepResult",
    "TrainResult",
    "load_state",
    "read_runs",
    "sweep",
    "train",
]
