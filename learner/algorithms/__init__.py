"""The registry of algorithms: advantages from rewards, and a loss. One file an algorithm, one line here."""

from ray_ddpo.common.recipe.registry import Registry

ALGORITHMS: Registry = {
    "alignprop": "ray_ddpo.learner.algorithms.alignprop:AlignProp",
    "awm": "ray_ddpo.learner.algorithms.awm:AdvantageWeightedMatching",
    "ddpo_is": "ray_ddpo.learner.algorithms.ddpo_is:DDPOImportanceSampling",
    "ddpo_sf": "ray_ddpo.learner.algorithms.ddpo_sf:DDPOScoreFunction",
    "dgpo": "ray_ddpo.learner.algorithms.dgpo:DirectGroupPreferenceOptimization",
    "diffusion_nft": "ray_ddpo.learner.algorithms.diffusion_nft:DiffusionNFT",
    "dpo": "ray_ddpo.learner.algorithms.dpo:DirectPreferenceOptimization",
    "dpok": "ray_ddpo.learner.algorithms.dpok:DPOK",
    "draft": "ray_ddpo.learner.algorithms.draft:DRaFT",
    "draft_lv": "ray_ddpo.learner.algorithms.draft_lv:DRaFTLowVariance",
    "flow_dppo": "ray_ddpo.learner.algorithms.flow_dppo:FlowDPPO",
    "gardo": "ray_ddpo.learner.algorithms.gardo:GARDO",
    "grpo": "ray_ddpo.learner.algorithms.grpo:GRPO",
    "grpo_guard": "ray_ddpo.learner.algorithms.grpo_guard:GRPOGuard",
    "refl": "ray_ddpo.learner.algorithms.refl:ReFL",
    "rwr": "ray_ddpo.learner.algorithms.rwr:RewardWeightedRegression",
    "rwr_sparse": "ray_ddpo.learner.algorithms.rwr_sparse:SparseRewardWeightedRegression",
    "sft": "ray_ddpo.learner.algorithms.sft:SupervisedFineTuning",
}
