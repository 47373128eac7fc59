"""The one exception that bad input raises."""


class HeadshareError(ValueError):
    """Bad input or an impossible request; the message names the thing and the remedy.

    The command prints the message alone and exits with code 2.

    Attributes:
      options: the arguments to change, by their Python names, where there are any; the command adds their flags to the
        message.
    """

    def __init__(self, message: str, *, option: str | tuple[str, ...] = ()):
        super().__init__(message)
        self.options = (option,) if isinstance(option, str) else option
