"""The findings: each theme's file explains, checks and fixes its codes. Importing the folder registers them all."""

from . import config, experts, files, kv_projections, manifest, skip_list, support, weights

__all__ = ["config", "experts", "files", "kv_projections", "manifest", "skip_list", "support", "weights"]
