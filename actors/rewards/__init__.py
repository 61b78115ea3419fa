"""The room of rewards: what is a good image. One file a reward, one line here."""

from common.registry import Room

REWARDS: Room = {
    "jpeg_compressibility": "actors.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "actors.rewards.jpeg:JpegIncompressibility",
    "aesthetic": "actors.rewards.aesthetic:Aesthetic",
    "animal_classifier": "actors.rewards.animal_classifier:AnimalClassifier",
    "vlm_alignment": "actors.rewards.vlm_alignment:VlmAlignment",
    "http": "actors.rewards.http:Http",
    "function": "actors.rewards.function:Function",
}
