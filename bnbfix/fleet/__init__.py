"""Scans and repairs of many models at once, on this machine's processes or on a Ray cluster."""
