"""The exception that reaches a user as a message instead of a traceback, and that of a download
that was to stop.
"""


class UserError(Exception):
    """Something outside the program is wrong: the message names it, says what was expected and
    what to do.
    """


class Stopped(Exception):
    """A download was stopped by the caller's event; what was downloaded whole is kept."""
