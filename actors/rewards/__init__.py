"""The registry of rewards. One file a reward, one line here."""

from ray_ddpo.common.recipe.registry import Registry

REWARDS: Registry = {
    "jpeg_compressibility": "ray_ddpo.actors.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "ray_ddpo.actors.rewards.jpeg:JpegIncompressibility",
    "brightness": "ray_ddpo.actors.rewards.image_statistics:Brightness",
    "colourfulness": "ray_ddpo.actors.rewards.image_statistics:Colourfulness",
    "sharpness": "ray_ddpo.actors.rewards.image_statistics:Sharpness",
    "edge_density": "ray_ddpo.actors.rewards.image_statistics:EdgeDensity",
    "entropy": "ray_ddpo.actors.rewards.image_statistics:Entropy",
    "dark_share": "ray_ddpo.actors.rewards.image_statistics:DarkShare",
    "aesthetic": "ray_ddpo.actors.rewards.aesthetic:Aesthetic",
    "clip_score": "ray_ddpo.actors.rewards.clip_score:ClipScore",
    "pickscore": "ray_ddpo.actors.rewards.pickscore:PickScore",
    "hps_v2": "ray_ddpo.actors.rewards.hps_v2:HpsV2",
    "hps_v3": "ray_ddpo.actors.rewards.hps_v3:HpsV3",
    "image_reward": "ray_ddpo.actors.rewards.image_reward:ImageReward",
    "animal_classifier": "ray_ddpo.actors.rewards.animal_classifier:AnimalClassifier",
    "vlm_alignment": "ray_ddpo.actors.rewards.vlm_alignment:VlmAlignment",
    "vlm_judge": "ray_ddpo.actors.rewards.vlm_judge:VlmJudge",
    "unified_reward": "ray_ddpo.actors.rewards.unified_reward:UnifiedReward",
    "edit_preservation": "ray_ddpo.actors.rewards.edit_preservation:EditPreservation",
    "motion": "ray_ddpo.actors.rewards.motion:Motion",
    "ocr": "ray_ddpo.actors.rewards.ocr:Ocr",
    "geneval": "ray_ddpo.actors.rewards.geneval:GenEval",
    "preference": "ray_ddpo.actors.rewards.preference:Preference",
    "http": "ray_ddpo.actors.rewards.http:Http",
    "function": "ray_ddpo.actors.rewards.function:FunctionReward",
}
