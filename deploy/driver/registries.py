"""Registry of components by recipe table, so that overrides are parsed by the component's types."""

REGISTRIES = {
    "PolicyTable": "ray_ddpo.common.diffusion:POLICIES",
    "PromptsTable": "ray_ddpo.common.prompts:PROMPTS",
    "RewardTable": "ray_ddpo.actors.rewards:REWARDS",
    "AlgorithmTable": "ray_ddpo.learner.algorithms:ALGORITHMS",
    "TrackerTable": "ray_ddpo.common.trackers:TRACKERS",
}
