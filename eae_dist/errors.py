"""Errors that a user can set right. A command prints their message as one line; any other exception keeps its traceback."""

import errno


class UserError(ValueError):
    """A setting, an argument or the content of a file that a user can correct; its message says how."""


class UserFileError(OSError):
    """A file, folder, address or disk that a user can set right; its message says how."""


class MissingFile(UserFileError, FileNotFoundError):
    """A file or folder that is not there."""


USER_ERRORS = (UserError, UserFileError, ChildProcessError)  # the last: a worker that was killed, as the memory was full


def is_users(error: BaseException) -> bool:
    """True if the message alone tells a user what to set right: a UserError, a file that the system names, or a full disk."""
    system_named = isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT))
    return isinstance(error, USER_ERRORS) or system_named
