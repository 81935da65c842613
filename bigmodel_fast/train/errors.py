"""What can go wrong in a training run, as one line each."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names its key. Raised before any work starts."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model; the message says which and why."""


class TrainError(RuntimeError):
    """A run that failed on its way (a full disk, a loss that stays NaN); what was saved before is intact."""
