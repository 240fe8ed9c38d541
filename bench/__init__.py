"""Timings and studies: pytest-benchmark runs ``suites``, and ``studies`` write the tables of the documents."""
