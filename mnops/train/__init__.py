"""Training a MobileNet: `python -m mnops train`. One concern a module; `loop` puts them together."""


class TrainError(ValueError):
    """The user's mistake, told in one sentence; the command prints it without a traceback."""
