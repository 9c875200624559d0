"""The one exception for mistakes that the person at the keyboard can mend."""


class UserError(Exception):
    """A wrong key, file or combination: shown as a message without a traceback, exit code 2.

    Args:
        message: what is wrong, naming the configuration key or the file, and what to do about it.
    """

    exit_code = 2
