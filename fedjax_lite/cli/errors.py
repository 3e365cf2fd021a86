"""What ends a command early."""


class UsageError(Exception):
    """The user can mend it: told in one line, exit code 2."""


class InterruptedRunError(Exception):
    """The user pressed Ctrl-C after something was recorded: exit code 130."""
