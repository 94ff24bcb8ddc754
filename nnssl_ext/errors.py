"""Define the exceptions for bad input."""

import errno


class UserError(SystemExit):
    """Report unusable input in one line.

    It derives from SystemExit, because stock ``nnUNetv2_train`` lets nothing else end the program with a line on stderr
    and status 1 instead of a traceback.

    Attributes:
        line: The message without the program's name.
    """

    def __init__(self, message: str) -> None:
        self.line = " ".join(message.split())
        super().__init__(f"nnssl_ext: error: {self.line}")


class NetworkError(UserError):
    """Report that a trainer cannot build the network of the plans."""


class RefusedError(ValueError):
    """Report a file that is not what it should be."""


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
