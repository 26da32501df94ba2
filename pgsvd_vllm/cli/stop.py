"""Ends a command on a signal, and says how to continue."""

import os
import signal
import socket
import threading
from types import FrameType

from pgsvd_vllm.errors import signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Stop:
    """Turns the first signal into KeyboardInterrupt; the second ends the process at once, also inside compiled code.

    Python runs signal handlers between its own instructions alone, so a thread watches for the second signal.

    Args:
        advice: printed by the second signal.

    Attributes:
        number: of the first signal; None before.
        is_over: whether the command has ended, so that a signal has nothing to interrupt.
    """

    def __init__(self, advice: str) -> None:
        self.advice = advice
        self.number: int | None = None
        self.is_over = False
        # nohup ignores SIGHUP, and a shell in the background SIGINT.
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._raise) for number in handled}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def status(self) -> int:
        """The exit status of the command after the signal, as shells report it."""
        return 128 + (self.number or signal.SIGINT)

    def _raise(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None and not self.is_over:
            self.number = number
            signals.append(number)
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """End the process at the second signal; every signal with a handler arrives here as one byte."""
        seen = 0
        while numbers := self._reader.recv(64):
            for number in numbers:
                seen += number in self._before
                if seen == 2:
                    try:
                        os.write(2, f"\npgsvd-vllm: interrupted again, ended at once; {self.advice}\n".encode())
                    finally:
                        os._exit(128 + number)

    def close(self) -> None:
        """Give the signals back to the handlers that they had before."""
        signals.clear()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        self._thread.join()
        self._reader.close()
