"""
Runs a step with its arguments, and ends it with a line and an exit code that say what went wrong.

    0    the step is done
    2    a fault in what the user gave, or a place where nothing can be written
    130  Ctrl-C, and 143 SIGTERM; it says which command goes on from there

Imports without torch.
"""

import signal
import sys
from collections.abc import Callable

from finetuning.config.parser import Parser
from finetuning.errors import UNWRITABLE, InputError, PlainOutput, fail, to_line
from finetuning.interrupts import Terminated, terminable
from finetuning.ranks import is_main_process, print_main


def same_command(overwrite: bool) -> str:
    """The command that goes on with what a start has done; to `overwrite` it again would lose that."""
    return "the same command without --overwrite" if overwrite else "the same command"


def run_step(
    main: Callable, *dataclass_types: type, fit_to_hardware: Callable[..., dict[str, str]] | None = None
) -> None:
    """Parse the arguments and run `main` with them; a fault in what the user gave ends it without a traceback.

    Args:
        fit_to_hardware: Takes the arguments, changes in them what this machine cannot do, and gives the reasons by key.
    """
    sys.stdout = PlainOutput(sys.stdout)
    parser = Parser(dataclass_types)
    arguments = parser.parse_args_and_config()
    try:
        reasons = fit_to_hardware(*arguments) if fit_to_hardware is not None else {}
        if parser.print_config:
            print_main("\n".join(parser.describe(arguments, reasons)))
            return
        with terminable():
            main(*arguments)
    except InputError as error:
        fail(to_line(str(error)))
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        fail(
            f"{error.filename or 'a file that this step writes'}: {error.strerror}. What stood there still does: make "
            "room, or give permission or another place, and start the same command again"
        )
    except KeyboardInterrupt as stop:
        if is_main_process():
            overwrite = any(vars(its_arguments).get("overwrite", False) for its_arguments in arguments)
            print(f"\nstopped; {same_command(overwrite)} goes on from here", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))
