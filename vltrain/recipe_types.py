"""What the sections of a recipe have in common: how strictly they are read, and paths."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True)


def _at_home(path: Path) -> Path:
    """A path with its `~` read, as a shell has read it in a flag."""
    return Path(os.path.expanduser(path))  # unlike Path.expanduser, leaves an unknown user alone


UserPath = Annotated[Path, AfterValidator(_at_home)]
Fault = tuple[str, str, str]  # key, what is wrong with it, how to mend it
