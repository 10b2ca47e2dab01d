"""Everything around a GPT-2 pretraining run that a checkpoint does not need.

The modules are leaves: each takes plain values, none knows the recipe, and the only arrows between
them are part-of relations. `train_accelerate.py` and the command-line verbs put them together.
"""

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can mend: bad input, a missing file, an unreachable Hub.

    The message is one line that says what is wrong and names the knob to turn. Every entry point
    prints it without a traceback and exits with status 2.
    """
