"""The one error of this package."""


class TqwError(ValueError):
    """Bad input. The message says what was expected, what came, and what to do."""
