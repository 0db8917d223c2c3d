"""The one error that users are meant to read."""


class SafelightError(ValueError):
    """A setting, file or device is not usable.

    message: one line for a person, what is wrong and what would be right. code: the kind of error
    for programs, such as "invalid", "no_model", "out_of_memory" or "not_finite". field: the
    setting that is at fault, None if it is no setting.

    The command line prints the message and exits with 2. Anything else that is raised is a fault
    of Safelight and keeps its traceback.
    """

    def __init__(self, message: str, *, code: str = "invalid", field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field
