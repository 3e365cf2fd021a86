"""Optional packages."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional module.

    Raises:
      ImportError: It is missing; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is not installed; run: pip install 'fedjax-lite[{extra}]'", name=package
        ) from error
