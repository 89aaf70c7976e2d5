"""Proves a repair."""
