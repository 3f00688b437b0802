"""The one kind of failure that is the user's to mend."""


class CommandError(Exception):
    """Printed as one line on stderr; the command then exits with status 2."""
