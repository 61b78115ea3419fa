"""Metrics to Weights & Biases: online where somebody is logged in, else kept on disk for `wandb sync`."""

import os
import uuid
from typing import Any, Literal

from common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker, require_package

NAME = "wandb"
FOLDER = "wandb"  # where wandb writes, by its own choice


class OpenRun(LiveTracker):
    """A run that wandb keeps open in this process."""

    def __init__(self, run: Any, info: RunInfo) -> None:
        self._run = run
        self._info = info
        # Not wandb's own step: that may not go back, and a resumed run does some rounds again.
        run.define_metric("round")
        run.define_metric("*", step_metric="round")

    def log(self, metrics: Metrics) -> None:
        self._run.log(metrics)

    def finish(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # finish alone may return before all is on disk
        self._info.move_up(FOLDER)

    def identity(self) -> str:
        return self._run.id


class WandbRun(Tracker):
    """Never asks for a login. A resumed run goes on in the wandb run whose id is in its checkpoint."""

    project: str = "ray-ddpo"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    def check(self) -> None:
        require_package(NAME, "wandb")

    def start(self, run: RunInfo) -> OpenRun:
        import wandb

        # Neither terminal output nor code nor the git state: what is in them is not ours to send.
        settings = wandb.Settings(console="off", disable_code=True, disable_git=True)
        opened = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            name=run.name,
            config=run.recipe,
            dir=run.local_folder,
            id=run.tracker_ids.get(NAME) or uuid.uuid4().hex[:8],
            resume="allow",
            mode=mode(),
            settings=settings,
        )
        return OpenRun(opened, run)


def mode() -> Literal["online", "offline", "disabled"]:
    """As WANDB_MODE says where it switches the network off; else online if wandb finds a login without asking."""
    import wandb

    wanted = os.environ.get("WANDB_MODE")
    if wanted == "disabled" or wanted == "offline":
        return wanted
    return "online" if wandb.login(prompt=False) else "offline"
