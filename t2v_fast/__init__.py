"""t2v-fast: exact diagonal Fisher information and Task2Vec embeddings, fast."""

from . import distance, ops
from .bank import Bank, BankError
from .data import DataError, TaskData
from .embedding import Embedding, FingerprintMismatch
from .fisher import FisherDiagonal, fisher
from .graph import UnsupportedError
from .precision import reduce_precision
from .probe import Preprocessing, Probe, load_probe
from .profile import Profile, profile
from .recorder import FisherRecorder
from .selfcheck import SelfCheckError
from .task2vec import Task2Vec

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
    "reduce_precision",
]
