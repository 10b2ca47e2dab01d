"""The same answers sooner, and never needed. Imports the model files."""
