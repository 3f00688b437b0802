"""The error of a command that the user can correct."""


class CommandError(Exception):
    """An error that is printed as one line on stderr. The command exits with status 2."""
