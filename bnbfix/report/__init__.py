"""Results in words and documents."""
