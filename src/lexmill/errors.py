"""Errors that speak to people. Anything else that is raised is a defect, and keeps its traceback."""


class Spoken(Exception):
    """What was wrong, where, and what would be right.

    Args:
        message: what was wrong, in one sentence.
        where: the place, as `file`, `file:line` or a config key; printed before the message.
        hint: what would be right.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  {self.hint}" if self.hint else text


class UserError(Spoken):
    """A user's mistake: verbs exit with code 2."""


class Failure(Spoken):
    """Something outside went wrong, such as a full disk: verbs exit with code 1."""


class MissingExtra(UserError):
    """A part was asked for whose optional dependency is not installed."""

    def __init__(self, extra: str, needed_for: str) -> None:
        super().__init__(f"{needed_for} needs the extra '{extra}'", hint=f"pip install 'lexmill[{extra}]'")
