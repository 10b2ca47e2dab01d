"""What others load: exports, verified, described, uploaded. Imports `system`, `data`, `records`,
the model files."""
