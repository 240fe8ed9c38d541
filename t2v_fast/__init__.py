"""t2v-fast: exact diagonal Fisher information and Task2Vec embeddings, fast."""

from . import ops
from .fisher import FisherDiagonal, FisherRecorder, SelfCheckError, UnsupportedError, fisher

__version__ = "0.1.0"
__all__ = ["FisherDiagonal", "FisherRecorder", "SelfCheckError", "UnsupportedError", "fisher", "ops"]
