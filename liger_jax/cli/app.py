"""The tyro application, and what the arguments of several commands share."""

from typing import Annotated

import tyro

app = tyro.extras.SubcommandApp()
CONFIG = (tyro.conf.OmitArgPrefixes,)

ModelArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
