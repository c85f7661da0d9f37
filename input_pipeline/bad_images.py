"""What a run does about images that cannot be read: training replaces a few and names them, the test allows none."""

from distributed.stop_coordinator import StopCoordinator
from utils import print_main


class BadImages:
    """The training images that could not be read, in all processes; the run ends when there are too many.

    Args:
        limit: how many there may be.
        coordinator: stops all processes at the same step.
        known: the ones that were found before an interruption of the run.
    """

    def __init__(self, limit: int, coordinator: StopCoordinator, known=()):
        self.limit, self.coordinator, self.known, self.found = limit, coordinator, set(known), set()

    def add(self, problems: list[str]) -> None:
        """Note the messages of a batch; too many in this process end the run."""
        self.found.update(problems)
        self._check(self.known | self.found)

    def share(self) -> None:
        """Tell all processes which images this one found. All processes must call it after the same step."""
        if self.limit == 0:
            return
        found = set().union(*self.coordinator.gather_objects(sorted(self.found - self.known)))
        for problem in sorted(found):
            print_main(f"warning: {problem}; replaced by another")
        self.known |= found
        self.found.clear()
        self._check(self.known)

    def _check(self, problems):
        if len(problems) > self.limit:
            more = f" ({len(problems)} of them)" if self.limit else ""
            self.coordinator.fail(
                f"training image {min(problems)}{more}; repair it, or let up to N be replaced with --skip_bad_images N"
            )


class BadTestImages:
    """Ends the run at the first test image that cannot be read: accuracy is over all test images."""

    def __init__(self, coordinator: StopCoordinator):
        self.coordinator = coordinator

    def add(self, problems: list[str]) -> None:
        """Note the messages of a batch; any ends the run."""
        if problems:
            self.coordinator.fail(f"test image {problems[0]}; repair it: accuracy is over all test images")
