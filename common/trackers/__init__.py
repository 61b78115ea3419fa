"""The room of trackers: where metrics go. One file a tracker, one line here."""

from common.registry import Room

TRACKERS: Room = {
    "jsonl": "common.trackers.jsonl:Jsonl",
    "terminal": "common.trackers.terminal:Terminal",
    "wandb": "common.trackers.wandb_run:WandbRun",
    "tensorboard": "common.trackers.tensorboard_files:TensorboardFiles",
    "ray": "common.trackers.ray_metrics:RayMetrics",
}
