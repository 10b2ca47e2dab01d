"""Optimizers: one file each, and the learning rate as a pure function of the step."""
