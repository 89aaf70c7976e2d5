"""Files beside the weights that could run as code: they are told of, and never opened here."""

from __future__ import annotations

from pathlib import PurePosixPath

PICKLES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
CODE = frozenset({".bat", ".dll", ".dylib", ".exe", ".ipynb", ".ps1", ".py", ".pyc", ".sh", ".so"})


def is_pickle(name: str) -> bool:
    """Does the name of this file say that it is a pickle, which runs code as it is loaded?"""
    return PurePosixPath(name).suffix.lower() in PICKLES


def is_code(name: str) -> bool:
    """Does the name of this file say that it is a program?"""
    return PurePosixPath(name).suffix.lower() in CODE
