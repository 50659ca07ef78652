"""The one exception that a user is meant to read.

Raised for everything the user can put right: a wrong config, a missing file, an unreachable hub. Its text is one line
that says what was given, what was expected and what to do. The command line prints it and leaves with exit code 2;
every other exception is a defect of ours and keeps its traceback.
"""

EXIT_CODE = 2
LONGEST = 1000
"""Characters; what was given may be a hostile file's, and of any length."""


class UserError(ValueError):
    """A mistake or a circumstance outside the program, told in one line."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]}...")
