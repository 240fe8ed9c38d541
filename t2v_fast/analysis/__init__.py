"""What embeddings say: distances, selection of feature extractors, pictures, the map."""
