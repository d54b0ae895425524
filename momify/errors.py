"""The one exception that stands for a user's mistake."""


class MomifyError(Exception):
    """A mistake in what the user gave: one line that names the thing, the value and the remedy.

    The command line prints the line and exits with code 2; no traceback is shown.
    """
