"""The findings: each theme's file explains, checks and fixes its codes."""
