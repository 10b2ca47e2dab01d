"""Pictures. Imports `records`, `evaluation`."""
