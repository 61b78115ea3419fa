"""DeathLines: one line on the terminal for each actor that dies, with its cause, its task and the reaction."""

import sys
import threading

from ray_ddpo.common.process_deaths import Death, cause_of
from ray_ddpo.deploy.driver.role_output import RoleOutput

LAST_WORDS_SECONDS = 1.5  # for the output of a dying process to reach the driver
UNKNOWN = "its process was killed (SIGKILL), as the kernel does where memory runs out"
UNHEARD = "its process crashed or was killed"


class DeathLines:
    """Printer of deaths. It uses threads, because the cause of a death is known a moment after the death."""

    def __init__(self, output: RoleOutput) -> None:
        self._output = output
        self._telling: list[threading.Thread] = []

    def tell(self, label: str, death: Death, then: str) -> None:
        """Print a death soon; `then` says how the run reacts."""
        telling = threading.Thread(target=self._tell, args=(label, death, then), name="death-lines", daemon=True)
        self._telling = [each for each in self._telling if each.is_alive()] + [telling]
        telling.start()

    def _tell(self, label: str, death: Death, then: str) -> None:
        cause = cause_of(death.reason)
        if cause is None:
            unknown = UNKNOWN if self._output.attached else UNHEARD
            cause = self._output.last_words(label, LAST_WORDS_SECONDS) or unknown
        ended = "was ended" if death.by_driver else "died"
        at = f" {death.at}" if death.at else ""
        print(f"{label} {ended}{at}: {cause}; {then}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wait until all lines are printed."""
        for telling in self._telling:
            telling.join()
