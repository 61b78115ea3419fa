"""Which room each table of a recipe names a component of, so that the command line's values are read by the component's types."""

ROOMS = {
    "PolicyTable": "common.diffusion:POLICIES",
    "PromptsTable": "common.prompts:PROMPTS",
    "RewardTable": "actors.rewards:REWARDS",
    "AlgorithmTable": "learner.algorithms:ALGORITHMS",
    "TrackerTable": "common.trackers:TRACKERS",
}
