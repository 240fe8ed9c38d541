"""Other people's code, unmodified, with and without this library: the same numbers, or better ones, in less time."""
