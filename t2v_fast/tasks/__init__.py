"""From images to an embedding: data, probes, heads and the pipeline, in one process or several."""
