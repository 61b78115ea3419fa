"""DeathLines: one line on the terminal for each actor that dies: who, how, at what, and what is done about it."""

import sys
import threading

from ray_ddpo.common.process_deaths import Death, cause_of
from ray_ddpo.deploy.driver.role_output import RoleOutput

LAST_WORDS_SECONDS = 1.5  # that a dying process's output may take to the driver
UNKNOWN = "its process was killed (SIGKILL), as the kernel does where memory runs out"
UNHEARD = "its process crashed or was killed"


class DeathLines:
    """Prints from threads of its own, because how a process died is known a moment after its death."""

    def __init__(self, output: RoleOutput) -> None:
        self._output = output
        self._telling: list[threading.Thread] = []

    def tell(self, label: str, death: Death, then: str) -> None:
        """Print a death soon; `then`: what is done about it."""
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
