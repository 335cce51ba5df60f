"""The one exception for what a user can cause: `main` prints its message and exits with code 2."""


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do."""


class RunFailed(Exception):
    """The run itself went wrong (a loss that is not finite, a broken certificate): exit code 1."""
