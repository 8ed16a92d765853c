"""The one error type that is the user's to fix, and what a person is told of an error."""

import errno


class UserError(ValueError):
    """Bad input: names the setting or file, what was found and what to do. Shown as one line, exit code 1."""


class RunError(UserError):
    """Of the whole run: all its processes raise it alike, and only the main one says it."""


def one_line(error: Exception) -> str:
    """What to say of an error that ends a command, in one line."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; free some and run the same command again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return f"internal error: {type(error).__name__}: {error}; run with --debug for the traceback"
