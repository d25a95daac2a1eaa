"""The one exception for input that cannot be used."""


class InputError(ValueError):
    """What the caller gave cannot be used; the message names the value received, what was wanted and the call to make.

    The command line turns it into one line on standard error and exit status 2, without a traceback.
    """
