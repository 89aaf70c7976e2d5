"""What a checkpoint is a model of: its family, its layers, the role of each tensor."""
