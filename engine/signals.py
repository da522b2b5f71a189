"""How a run is asked to stop."""

import signal


class Signals:
    """A context that remembers the first SIGINT or SIGTERM, so that the run can save its step; a second one kills."""

    received: signal.Signals | None = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.received = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)
