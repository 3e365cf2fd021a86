"""Optional packages."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional module.

    Raises:
      ImportError: It is missing; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module.partition(".")[0], extra) from error


def folder_of(package: str, extra: str) -> Path:
    """Where an optional package lies, of which a file is read and nothing imported.

    Raises:
      ImportError: It is missing; the message names the extra that installs it.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise _missing(package, extra)
    return Path(found.origin).parent


def _missing(package: str, extra: str) -> ImportError:
    return ImportError(
        f"{package} is not installed; run: pip install 'fedjax-lite[{extra}]'", name=package
    )
