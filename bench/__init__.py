"""Timings and studies: ``suites`` are run by pytest-benchmark, ``studies`` write the tables of the documents."""
