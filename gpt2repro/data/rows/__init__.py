"""Units to the rows of a step: which document comes when. Imports `corpora` and `tokens`."""
