"""Adapters: the interfaces of other code in front of this library, one file for each."""
