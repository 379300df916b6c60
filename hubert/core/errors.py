"""The errors that a user can meet, and what each one asks for.

    HubertError
    ├── ConfigError         a setting is wrong: nothing was started; names the field, its value and the rule
    ├── DataError           the data is wrong: names the file, what was expected and found, the likely cause, the fix
    ├── TransientError      the surroundings failed (network, a lost worker): worth another try
    │   └── DiskError       a disk did not take a file: it is full, over a quota or a size limit, or gone
    ├── TrainingDiverged    too many non-finite steps in a row: another try would end the same way
    └── TrainingCancelled   a person stopped the training: only a person starts it again

Callers retry by class, never by reading a message.
"""


class HubertError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(HubertError):
    """A setting cannot be obeyed. Raised before any work is queued."""


class DataError(HubertError):
    """A file, manifest or checkpoint is not what it has to be."""


class TransientError(HubertError):
    """Something outside failed for a moment; the same call may succeed later."""


class DiskError(TransientError):
    """A disk did not take a file. `number` is the errno."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.number = number

    def __str__(self) -> str:
        return str(self.args[0])


class TrainingDiverged(HubertError):
    """The loss was not finite for many steps in a row."""


class TrainingCancelled(HubertError):
    """A person stopped the training."""


def first_line(error: BaseException, *, after: str = "") -> str:
    """Return the first line of what an error of another library says, to stand in a message of ours.

    Args:
        error: the error.
        after: a text of which only what follows is taken, such as the library's own name for the fault.

    Returns:
        At most 200 characters; the name of the error's class if it says nothing.
    """
    text = str(error)
    text = text.rpartition(after)[2] if after else text
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip()[:200]
