"""Banks of embeddings: the bank, its index and exports, job files, and the driver of workers."""

from .manifest import FIELDS, FORMAT, LONGEST_NAME, VERSION, BankError, NotInBank, check_name
from .store import Bank

__all__ = ["FIELDS", "FORMAT", "LONGEST_NAME", "VERSION", "Bank", "BankError", "NotInBank", "check_name"]
