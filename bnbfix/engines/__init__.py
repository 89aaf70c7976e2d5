"""What loads a checkpoint: the parameters that an engine makes, and the skip entries that it understands."""
