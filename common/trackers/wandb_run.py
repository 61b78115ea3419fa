"""Metrics to Weights & Biases: online where somebody is logged in, else kept on disk for `wandb sync`."""

import os
import uuid
from pathlib import Path
from typing import Any, Literal

from common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker, require_package

ID_FILE = "wandb_id.txt"


class OpenRun(LiveTracker):
    """A run that wandb keeps open in this process."""

    def __init__(self, run: Any) -> None:
        self._run = run
        # Not wandb's own step: that may not go back, and a resumed run does some rounds again.
        run.define_metric("round")
        run.define_metric("*", step_metric="round")

    def log(self, metrics: Metrics) -> None:
        self._run.log(metrics)

    def finish(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # finish alone may return before all is on disk


class WandbRun(Tracker):
    """Never asks for a login. A resumed run goes on in the wandb run whose id is in its folder."""

    project: str = "ray-ddpo"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    def check(self) -> None:
        require_package("wandb", "wandb")

    def start(self, run: RunInfo) -> OpenRun:
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        # Neither terminal output nor code nor the git state: what is in them is not ours to send.
        settings = wandb.Settings(console="off", disable_code=True, disable_git=True)
        opened = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            name=run.name,
            config=run.recipe,
            dir=run.folder,
            id=run_id(run.folder, run.first_round),
            resume="allow",
            mode=mode(),
            settings=settings,
        )
        return OpenRun(opened)


def run_id(folder: Path, first_round: int) -> str:
    """The id kept in the folder where a run is resumed, else a new one, which is kept there."""
    file = folder / ID_FILE
    if first_round == 0 or not file.is_file():
        file.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def mode() -> Literal["online", "offline", "disabled"]:
    """As WANDB_MODE says where it switches the network off; else online if wandb finds a login without asking."""
    import wandb

    wanted = os.environ.get("WANDB_MODE")
    if wanted == "disabled" or wanted == "offline":
        return wanted
    return "online" if wandb.login(prompt=False) else "offline"
