"""How a run is asked to stop."""

import signal


class Signals:
    """A context that remembers the first SIGINT or SIGTERM in `received`, so that the run can save its step.

    A second signal of the same kind kills. One of the other kind does not: Ctrl-C reaches the runs of a `Pool` from the
    terminal as SIGINT, and from the pool as SIGTERM.
    """

    received: signal.Signals | None = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.received = self.received or signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)
