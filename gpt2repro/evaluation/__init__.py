"""Figures with standard errors. Imports `system`, the model files."""
