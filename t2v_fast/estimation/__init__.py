"""From a model and a loader to a diagonal Fisher: cotangents, allocation, moments, label sets, profiling."""
