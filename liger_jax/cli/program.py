"""Runs a command: registers the commands, and prints errors and warnings as single lines."""

import contextlib
import errno
import logging
import sys
import warnings
from collections.abc import Sequence

from liger_jax import names, runtime
from liger_jax.cli import suggestions
from liger_jax.cli.app import CONFIG, app
from liger_jax.cli.chat import chat
from liger_jax.cli.completion import completion
from liger_jax.cli.convert import convert
from liger_jax.cli.demo import demo
from liger_jax.cli.env import env
from liger_jax.cli.finetune import finetune
from liger_jax.cli.generate import generate
from liger_jax.cli.plan import plan
from liger_jax.cli.tune import tune
from liger_jax.errors import UserError, closest
from liger_jax.files import DISK_ERRORS, disk_error_code

# In the order of the help text.
COMMANDS = {
    command.__name__: app.command(command)
    for command in (demo, finetune, generate, chat, plan, convert, tune, env, completion)
}

# Operating system errors that the user can fix: about a disk, and about a path.
SYSTEM_ERRORS = (*DISK_ERRORS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EPIPE)
USAGE = 2  # exit status for an unknown command or flag
INTERRUPTED = 130  # exit status of a process that SIGINT ends, as shells report it
BUG_HINT = "This looks like a bug in liger-jax. Please report it with this traceback and the output of `liger-jax env`."

DESCRIPTION = (
    "Qwen2-VL, Qwen2.5-VL and Qwen3-VL for JAX: fine-tune, ask questions, convert checkpoints. "
    "`liger-jax COMMAND --help` lists the flags of a command, `liger-jax --version` prints the version."
)


def run(arguments: Sequence[str], prog: str) -> None:
    """Runs a command. An error that the user can fix ends it with one line on stderr; other errors keep their traceback.

    Warnings of this project are printed as one line; other packages are silent. Ctrl-C ends a command with status 130. An
    unknown command or flag ends with status 2 and a suggestion.

    Args:
        arguments: the command and its arguments.
        prog: name of the program in help texts.
    """
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        hint = closest(arguments[0], list(COMMANDS))
        print(f"liger-jax: command is {arguments[0]!r}; expected one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        sys.exit(USAGE)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        runtime.silence_packages()
        try:
            names.check_commands()
            app.cli(args=arguments, prog=prog, description=DESCRIPTION, config=CONFIG)
        except SystemExit as error:
            for line in suggestions.flags_of_others(arguments) if error.code == USAGE else ():
                print(f"liger-jax: {line}", file=sys.stderr)
            raise
        except KeyboardInterrupt:
            print("liger-jax: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except Exception as error:
            if can_user_fix(error):
                if is_reported_elsewhere(error):
                    sys.exit(1)
                notes = () if isinstance(error, UserError) else getattr(error, "__notes__", ())  # what a run saved
                message = " ".join([str(error), *notes])
                sys.exit(f"liger-jax: {' '.join(message.split())}")
            error.add_note(BUG_HINT)  # printed after the traceback
            raise


def can_user_fix(error: Exception) -> bool:
    """Returns whether the user can fix an error: a mistake, or for example a full or read-only disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in SYSTEM_ERRORS
    # TensorStore, which writes checkpoints, reports disk errors as ValueErrors
    return isinstance(error, UserError) or (isinstance(error, ValueError) and disk_error_code(error) is not None)


def is_reported_elsewhere(error: Exception) -> bool:
    """Returns whether all of several processes have raised this error, and process 0, which is another one, prints it."""
    processes = sys.modules.get("liger_jax.processes")  # imported only by commands that may run in several processes
    return processes is not None and processes.is_agreed(error) and not processes.is_first()
