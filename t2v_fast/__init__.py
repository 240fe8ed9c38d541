"""t2v-fast: exact diagonal Fisher information and Task2Vec embeddings, fast."""

from . import _moved, ops
from .analysis import distance
from .bank.store import Bank, BankError
from .embedding import Embedding, FingerprintMismatch
from .estimation.diagonal import FisherDiagonal
from .estimation.estimator import fisher
from .estimation.profiling import Profile, profile
from .estimation.self_check import SelfCheckError
from .gradients.graph import UnsupportedError
from .gradients.recorder import FisherRecorder
from .tasks.data import DataError, TaskData
from .tasks.pipeline import Task2Vec
from .tasks.precision import reduce_precision
from .tasks.probe import Preprocessing, Probe, load_probe
from .zoo import rank_zoo

_moved.install()

__version__ = "0.1.0"
__all__ = [
    "Bank",
    "BankError",
    "DataError",
    "Embedding",
    "FingerprintMismatch",
    "FisherDiagonal",
    "FisherRecorder",
    "Preprocessing",
    "Probe",
    "Profile",
    "SelfCheckError",
    "Task2Vec",
    "TaskData",
    "UnsupportedError",
    "distance",
    "fisher",
    "load_probe",
    "ops",
    "profile",
    "rank_zoo",
    "reduce_precision",
]
