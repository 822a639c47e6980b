"""
Stopping a step that has requests in flight: what was asked for is waited for, as it may be paid for. Imports without torch.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable


class SoftStop:
    """The first SIGINT (Ctrl-C) or SIGTERM asks to stop; the second ends what runs at once, with a KeyboardInterrupt.

    A signal that was ignored when the step was started, as SIGINT is under `nohup command &`, stays ignored.

    Args:
        loop: What runs the requests.
        describe: What is waited for, in words; called when the first signal comes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, describe: Callable[[], str]):
        self.event = asyncio.Event()  # set soon after the first signal
        self.signal: int | None = None  # the first one
        self._loop, self._describe = loop, describe
        self._before: dict[int, object] = {}

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

    def _on_signal(self, number: int, frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self._loop.call_soon_threadsafe(self._announce)  # a signal may come in the middle of another print

    def _announce(self) -> None:
        self.event.set()  # before it is said, as the second signal may come at once
        print(f"\n{self._describe()}; Ctrl-C again drops them", file=sys.stderr, flush=True)
