"""The room of rewards: what is a good image. One file a reward, one line here."""

from common.registry import Room

REWARDS: Room = {
    "jpeg_compressibility": "actors.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "actors.rewards.jpeg:JpegIncompressibility",
    "brightness": "actors.rewards.picture_statistics:Brightness",
    "colourfulness": "actors.rewards.picture_statistics:Colourfulness",
    "sharpness": "actors.rewards.picture_statistics:Sharpness",
    "entropy": "actors.rewards.picture_statistics:Entropy",
    "dark_share": "actors.rewards.picture_statistics:DarkShare",
    "aesthetic": "actors.rewards.aesthetic:Aesthetic",
    "clip_score": "actors.rewards.clip_score:ClipScore",
    "pickscore": "actors.rewards.pickscore:PickScore",
    "hps_v2": "actors.rewards.hps_v2:HpsV2",
    "image_reward": "actors.rewards.image_reward:ImageReward",
    "animal_classifier": "actors.rewards.animal_classifier:AnimalClassifier",
    "vlm_alignment": "actors.rewards.vlm_alignment:VlmAlignment",
    "http": "actors.rewards.http:Http",
    "function": "actors.rewards.function:Function",
}
