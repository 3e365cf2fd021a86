"""`fedjax-lite list`: what the settings of a run can choose from."""

import dataclasses
import difflib
import inspect
from typing import Annotated

from tyro.conf import Positional, arg

from fedjax_lite.cli.errors import UsageError
from fedjax_lite.experiments.expressions import Role
from fedjax_lite.experiments.tables import LISTED


@dataclasses.dataclass(frozen=True)
class List:
    """Show what settings can choose from, with signatures, or all about one of them.

    Attributes:
      what: algorithms, models, datasets, partitions, samplers, updates, optimizers, schedules or
        metrics, for the call of each, with its defaults, and what it is; or the name of one, such
        as scaffold, for its documentation. All kinds and names by default.
    """

    what: Annotated[Positional[str | None], arg(metavar="WHAT", help_behavior_hint="")] = None


def list_choices(options: List) -> None:
    """Runs the command.

    Raises:
      UsageError: There is nothing of that name.
    """
    if options.what is None:
        for plural, role in LISTED.items():
            print(f"{plural}: {', '.join(role.table)}")
        return
    name = options.what.replace("-", "_")
    if name in LISTED:
        for one in LISTED[name].table:
            told = (inspect.getdoc(LISTED[name].table[one]) or "").partition("\n")[0]
            print(f"{_signature(LISTED[name], one)}\n    {told}")
        return
    found = [role for role in LISTED.values() if name in role.table]
    if not found:
        names = [*LISTED, *(one for role in LISTED.values() for one in role.table)]
        close = difflib.get_close_matches(name, names, 1)
        meant = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(LISTED)}"
        raise UsageError(f"there is no {options.what}; {meant}")
    for role in found:
        print(f"{_signature(role, name)}\n\n{inspect.getdoc(role.table[name])}")


def _signature(role: Role, name: str) -> str:
    """A call as an expression writes it, without what the program fills in."""
    parameters = inspect.signature(role.table[name]).parameters.values()
    told = [p.replace(annotation=p.empty) for p in parameters if p.name not in role.known]
    return f"{name}{inspect.Signature(told)}"
