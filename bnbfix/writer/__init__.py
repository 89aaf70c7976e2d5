"""Writes a planned output, whole or not at all."""
