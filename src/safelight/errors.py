"""The one error that users are meant to read."""


class SafelightError(ValueError):
    """A setting, file or device is not usable.

    The message is one line: what is wrong and what would be right. The command line prints it
    and exits with 2; anything else that is raised is a fault of ours and keeps its traceback.
    """
