"""Errors that a caller may want to catch.

FastVLMError
├── ConfigError        a configuration names an unknown key, or values that contradict
├── CheckpointError    weights are missing, left over, or of the wrong shape
├── InputError         an image, a prompt or an option that cannot be used
│   └── ContextError   prompt and image do not fit the context window
├── ExportError        an export cannot be made here, or what was written does not compute what the model computes
├── TrainingError      a run cannot go on: no finite numbers, a process that ended, no memory
├── DownloadError      an address cannot be fetched, or what came is not what was promised
└── DeviceError        the device or the dtype asked for is not here
"""


class FastVLMError(Exception):
    """Base class: `except FastVLMError` catches every error this package raises on purpose."""


class ConfigError(FastVLMError):
    """A configuration names an unknown key, or values that contradict each other."""


class CheckpointError(FastVLMError):
    """Weights are missing, left over, or of the wrong shape."""


class InputError(FastVLMError):
    """An image, a prompt or an option that cannot be used."""


class ContextError(InputError):
    """Prompt and image together do not fit the context window."""


class ExportError(FastVLMError):
    """An export cannot be made here, or what was written does not compute what the model computes."""


class TrainingError(FastVLMError):
    """A run cannot go on: no finite numbers, a process that ended, no memory."""


class DownloadError(FastVLMError):
    """An address cannot be fetched, or what came is not what was promised."""


class DeviceError(FastVLMError):
    """The device or the dtype asked for is not available here."""
