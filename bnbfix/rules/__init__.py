"""The findings: each theme's file explains, checks and fixes its codes. Importing the folder registers them all."""

from . import config, experts, files, gemma4, kv_projections, manifest, skip_list, storage, support, weights

__all__ = [
    "config",
    "experts",
    "files",
    "gemma4",
    "kv_projections",
    "manifest",
    "skip_list",
    "storage",
    "support",
    "weights",
]
