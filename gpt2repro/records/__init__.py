"""What a run leaves on disk, and how it is opened. Imports `system`, `data`, the model files."""
