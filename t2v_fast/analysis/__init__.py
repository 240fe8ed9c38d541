"""Analyses of embeddings: distances, the choice of feature extractors, pictures and the map."""
