"""The one thing that all of the library's errors for users share."""


class UserError(ValueError):
    """Something that whoever runs a command can mend. Its text is one line: what is wrong with
    what, what was expected, what to do. Commands print it and end with exit code 2."""
