"""The one kind of error that steps report without a traceback."""


class InputError(ValueError):
    """A fault in what the user gave (a path, a file, a setting). Its text says what is wrong and what to do."""
