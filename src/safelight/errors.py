"""The error whose message users read, two kinds of it about storage, and errors of others."""

from typing import Self


class SafelightError(ValueError):
    """A setting, file or device is not usable.

    The message is one line for a person: what is wrong and what would be right. The command line
    prints it and exits with 2. Any other exception is a fault of ours and keeps its traceback.

    code: for programs; "invalid", or a narrower word that the raising module documents, such as
      "unknown_setting", "not_finite" or "queue_full".
    field: the name in `Request` of the setting at fault; None if no setting is at fault.
    """

    def __init__(self, message: str, *, code: str = "invalid", field: str | None = None) -> None:
        super().__init__(message)
        self.code, self.field = code, field

    def renamed(self, field: str) -> Self:
        """Return the same error with its setting under another interface's name.

        A message about a setting begins with the setting's name, which is replaced as well.
        """
        own = self.field or ""
        error = SafelightError.__new__(type(self))
        SafelightError.__init__(
            error,
            f"{field}{str(self)[len(own) :]}" if own and str(self).startswith(own) else str(self),
            code=self.code,
            field=field,
        )
        return error


class StorageError(SafelightError):
    """Something could not be kept or read: the disk is full, or the database does not answer."""

    def __init__(self, message: str, *, code: str = "storage") -> None:
        super().__init__(message, code=code)


class AwayError(StorageError):
    """A remote storage, such as an object store, cannot be used now."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="storage_away")


def first_line(error: BaseException | None, most: int = 100) -> str:
    """Return the first line of an error's text, at most `most` characters; its type if it has none.

    For errors of others in our messages, which are one line.
    """
    return (str(error).splitlines() or [type(error).__name__])[0][:most]
