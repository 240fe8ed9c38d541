"""From images to an embedding: data, probes, heads, the pipeline, one process or several."""
