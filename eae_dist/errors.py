"""Errors that a user can set right. A command prints their message as one line; any other exception keeps its traceback."""


class UserError(ValueError):
    """A setting, an argument or a file that a user can correct; its message says how."""
