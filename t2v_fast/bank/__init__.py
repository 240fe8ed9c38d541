"""Keeping and mass-producing embeddings: the bank, its index and exports, job files, and the driver of workers."""

from .store import FIELDS, FORMAT, LONGEST_NAME, VERSION, Bank, BankError, check_name

__all__ = ["FIELDS", "FORMAT", "LONGEST_NAME", "VERSION", "Bank", "BankError", "check_name"]
