"""The one exception that reaches a user as a message instead of a traceback."""


class UserError(Exception):
    """Something outside the program is wrong: the message names it, says what was expected and
    what to do.
    """
