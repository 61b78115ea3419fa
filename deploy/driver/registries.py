"""Which room each table of a recipe names a component of, so that the command line's values are read by the component's types."""

ROOMS = {
    "PolicyTable": "ray_ddpo.common.diffusion:POLICIES",
    "PromptsTable": "ray_ddpo.common.prompts:PROMPTS",
    "RewardTable": "ray_ddpo.actors.rewards:REWARDS",
    "AlgorithmTable": "ray_ddpo.learner.algorithms:ALGORITHMS",
    "TrackerTable": "ray_ddpo.common.trackers:TRACKERS",
}
