"""Everything around a GPT-2 pretraining run that a checkpoint does not need.

Rooms, from what imports nothing to what imports all: system, data, speed, records, evaluation,
plots, publishing, training, commands. Each is entered through its own modules, and the arrows
between them go one way (tests/test_architecture.py). Below training nobody knows the recipe: what
is there takes plain values.
"""

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can mend: bad input, a missing file, an unreachable Hub.

    The message is one line that says what is wrong and names the knob to turn. Every entry point
    prints it without a traceback and exits with status 2.
    """
