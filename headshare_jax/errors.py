"""The one exception that bad input raises."""


class HeadshareError(Exception):
    """Bad input or an impossible request; the message names the thing and the remedy.

    The command line prints the message alone and exits with code 2.
    """
