"""The registry of trackers, to which metrics go. One file a tracker, one line here."""

from ray_ddpo.common.recipe.registry import Registry

TRACKERS: Registry = {
    "jsonl": "ray_ddpo.common.trackers.jsonl:Jsonl",
    "terminal": "ray_ddpo.common.trackers.terminal:Terminal",
    "wandb": "ray_ddpo.common.trackers.wandb_run:WandbRun",
    "tensorboard": "ray_ddpo.common.trackers.tensorboard_files:TensorboardFiles",
    "ray": "ray_ddpo.common.trackers.ray_metrics:RayMetrics",
}
