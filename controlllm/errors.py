"""The errors that are the user's to fix, those that another try may cure, and what a person is told of an error."""

import errno
import re


class UserError(ValueError):
    """Bad input: names the setting or file, what was found and what to do. Shown as one line, exit code 1."""


class RunError(UserError):
    """Of the whole run: all its processes raise it alike, and only the main one says it."""


class Outage(UserError):
    """Of something outside (a storage, another machine, a request to stop): the same command may work later."""


_PASSING = {
    errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EPIPE, errno.ENOTCONN,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
    errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET,
}  # fmt: skip
_LOST = re.compile(
    r"\bNCCL\b.*(error|timeout|abort)|gloo.*(connection|timed? ?out)|connection (closed|reset|refused) by"
    r"|uncorrectable ECC|GPU has fallen off the bus|unspecified launch failure",
    re.DOTALL | re.IGNORECASE,
)
"""What torch says, as plain RuntimeErrors, of another process or a GPU that is gone."""


def is_passing(error: BaseException) -> bool:
    """Whether another try may succeed: a storage or another process was lost. Mistakes and bugs stay what they are."""
    if isinstance(error, UserError):
        return isinstance(error, Outage)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    # torch's own, by name: this module loads no torch.
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):
        return True
    return error.__cause__ is not None and is_passing(error.__cause__)


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
