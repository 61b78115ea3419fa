"""The registry of algorithms: advantages from rewards, and a loss. One file an algorithm, one line here."""

from ray_ddpo.common.recipe.registry import Registry

ALGORITHMS: Registry = {
    "ddpo_is": "ray_ddpo.learner.algorithms.ddpo_is:DDPOImportanceSampling",
    "ddpo_sf": "ray_ddpo.learner.algorithms.ddpo_sf:DDPOScoreFunction",
    "diffusion_nft": "ray_ddpo.learner.algorithms.diffusion_nft:DiffusionNFT",
    "dpok": "ray_ddpo.learner.algorithms.dpok:DPOK",
    "grpo": "ray_ddpo.learner.algorithms.grpo:GRPO",
    "rwr": "ray_ddpo.learner.algorithms.rwr:RewardWeightedRegression",
    "rwr_sparse": "ray_ddpo.learner.algorithms.rwr_sparse:SparseRewardWeightedRegression",
}
