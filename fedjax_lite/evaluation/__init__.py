"""What a model is worth: metrics, on examples of the server and by client.

Evaluations of clients are rounds without training: the engine maps them, too.
"""

from fedjax_lite.evaluation.central import evaluate
from fedjax_lite.evaluation.clients import ClientEvaluation, evaluate_clients, summarize_clients
from fedjax_lite.evaluation.fine_tune import evaluate_fine_tuned

__all__ = [
    "ClientEvaluation",
    "evaluate",
    "evaluate_clients",
    "evaluate_fine_tuned",
    "summarize_clients",
]
