"""
Stopping a step with what is open closed; what was asked of an endpoint is waited for, as it may be paid for.

Imports without torch.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from finetuning.ranks import get_world_size

Handler = Callable[[int, FrameType | None], Any] | int | None  # of a signal, as the signal module gives it


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise as Ctrl-C does, where the default is to end the process at once.

    Not under torchrun: ranks that wait for each other would not hear of it, and torchrun kills what goes on.
    """
    process = os.getpid()

    def on_signal(number: int, frame) -> None:
        if os.getpid() != process:  # a worker that was forked from this one, which nobody waits for
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise Terminated

    replaces = get_world_size() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if replaces:
        signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        if replaces:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class SoftStop:
    """The first SIGINT (Ctrl-C) or SIGTERM asks to stop; the second ends what runs at once, with a KeyboardInterrupt.

    A signal that was ignored when the step was started, as SIGINT is under `nohup command &`, stays ignored.

    Args:
        loop: What runs the requests.
        describe: What is waited for, in words; called when the first signal comes.
        event: It is set soon after the first signal.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, describe: Callable[[], str], event: asyncio.Event | None = None
    ):
        self.event = event or asyncio.Event()
        self.signal: int | None = None  # the first one
        self._loop, self._describe = loop, describe
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> "SoftStop":
        # loop.add_signal_handler would do, but for Windows, which has none
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def sleep(self, seconds: float) -> bool:
        """Wait, but not longer than until the first signal; whether there was one."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.event.wait(), seconds)
        return self.signal is not None

    def pass_on(self) -> None:
        """Stop the step as the first signal would have without this, once all is done that was waited for.

        Raises:
            KeyboardInterrupt: There was a signal.
        """
        if self.signal is not None:
            raise Terminated if self.signal == signal.SIGTERM else KeyboardInterrupt

    def _on_signal(self, number: int, frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self._loop.call_soon_threadsafe(self._announce)  # a signal may come in the middle of another print

    def _announce(self) -> None:
        self.event.set()  # before it is said, as the second signal may come at once
        print(f"\n{self._describe()}; Ctrl-C again drops them", file=sys.stderr, flush=True)
