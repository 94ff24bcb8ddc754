"""The exceptions for bad input."""


class UserError(SystemExit):
    """Report input that cannot be used, in one line: what was expected, what was got, what to do.

    It derives from SystemExit, because stock ``nnUNetv2_train`` lets nothing else end the program with a line on stderr
    and status 1 instead of a traceback.

    Attributes:
        line: The message without the program's name.
    """

    def __init__(self, message: str) -> None:
        self.line = " ".join(message.split())
        super().__init__(f"nnssl_ext: error: {self.line}")


class RefusedError(ValueError):
    """Report a file that is not what it should be. The message says why."""
