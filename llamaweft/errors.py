"""The two ways in which a command ends without success, each with one clear sentence."""


class UserError(Exception):
    """A mistake in what was asked for: a file, a row, a key, a value.

    Its text is one sentence that says what is wrong, where, and what to do.
    The command line prints it without a traceback and exits with 2.
    """


class RunError(Exception):
    """What was asked for is sound but did not work out, such as an export that fails its proof.

    Its text is one sentence. The command line prints it without a traceback and exits with 1.
    """
