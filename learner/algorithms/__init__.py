"""The room of algorithms: what a reward is worth, and what we descend on. One file an algorithm, one line here."""

from common.registry import Room

ALGORITHMS: Room = {
    "ddpo_is": "learner.algorithms.ddpo_is:DDPOImportanceSampling",
    "ddpo_sf": "learner.algorithms.ddpo_sf:DDPOScoreFunction",
    "diffusion_nft": "learner.algorithms.diffusion_nft:DiffusionNFT",
    "dpok": "learner.algorithms.dpok:DPOK",
    "grpo": "learner.algorithms.grpo:GRPO",
    "rwr": "learner.algorithms.rwr:RewardWeightedRegression",
    "rwr_sparse": "learner.algorithms.rwr_sparse:SparseRewardWeightedRegression",
}
