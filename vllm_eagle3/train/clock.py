"""How far a run is, how fast, and how long it will take."""

import time

from vllm_eagle3.train.distributed import World


class Clock:
    """Time and progress of a run that may have had parts before this one.

    Args:
        minutes: wall-clock limit over all parts; None for no limit.
    """

    def __init__(self, minutes: float | None, world: World) -> None:
        self.minutes, self.world = minutes, world
        self.seconds_before = 0.0
        self._started = time.monotonic()

    def start(self, step: int, tokens_seen: int, num_steps: int) -> None:
        """This part begins at ``step`` of about ``num_steps``."""
        self._started = time.monotonic()
        self._num_steps = num_steps
        self._tokens_before = tokens_seen
        self._progress_before = self.progress(step)

    def seconds(self) -> float:
        """Of all parts of the run."""
        return self.seconds_before + time.monotonic() - self._started

    def progress(self, step: int) -> float:
        """Share of the run that is over, by steps or by time, whichever ends first.

        Only time makes it 1: the steps end with the data, a few more or less than was said.
        With a time limit all processes take the main one's answer: they must stop together,
        and at the same learning rate.
        """
        by_steps = min(step, self._num_steps - 1) / self._num_steps
        if self.minutes is None:
            return by_steps
        return max(by_steps, self.world.number_of_main(self.seconds() / (60 * self.minutes)))

    def report(self, step: int, tokens_seen: int) -> dict[str, float]:
        """Seconds so far, tokens a second of this part, and seconds to go."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        by_steps = step / self._num_steps
        done = by_steps
        if self.minutes is not None:
            done = max(by_steps, self.seconds() / (60 * self.minutes))
        gained = max(done - self._progress_before, 1e-9)
        return {
            "seconds": self.seconds(),
            "tokens_per_second": round((tokens_seen - self._tokens_before) / elapsed),
            "eta_seconds": max(0.0, 1 - done) * elapsed / gained,
        }
