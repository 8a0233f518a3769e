"""The one exception for what a user got wrong."""


class UserError(Exception):
    """Wrong input: its text is all that the user sees, and the command exits with code 2.

    The text names the key, file or sample, what was found there and what was expected.
    """
