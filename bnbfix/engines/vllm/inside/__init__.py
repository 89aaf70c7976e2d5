"""Runs inside a Python that has vLLM, in a process of its own.

The folder is copied next to the job and run from there, so that nothing of bnbfix's own environment is in reach.
"""
