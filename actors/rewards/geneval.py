"""GenEval: objects, counts, colours and positions that a detector sees, compared with the prompt's metadata."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from ray_ddpo.actors.detection.detector import DetectedObject, Detector
from ray_ddpo.actors.detection.hub import CLIP, MASK2FORMER, HubDetector, hub_needs
from ray_ddpo.actors.detection.requirements import Requirements, requirements
from ray_ddpo.actors.detection.rules import POSITION_THRESHOLD, is_correct, kept_objects, soft_score
from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.model_files.pretrained import Precision, weight_bytes
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.registry import import_object

COUNTING = "counting"  # the category that has a threshold of its own
PARAMETERS = 68_790_000 + 427_616_513  # of the authors' detector, and of CLIP


class GenEval(Reward):
    """Verdict of GenEval (Ghosh et al. 2023), or Flow-GRPO's score with partial credit (Liu et al. 2025).

    A prompt's metadata are GenEval's line: `tag`, `include` with `class`, `count`, `color` and `position`, and `exclude`.
    """

    required_packages: ClassVar[tuple[str, ...]] = ("scipy",)

    measure: Literal["soft", "strict", "correct"] = "soft"
    """Flow-GRPO's score, up to 1 (`soft`); 1 if every count, colour and position is exactly right, else 0 (`strict`); or
    the authors' verdict, in which further objects do no harm unless they are excluded (`correct`)."""
    detector: str = Field(default="hub", pattern=r"^(hub|shapes|[\w.]+:\w+)$")
    """Detector: `hub`, the models of the two keys below; `shapes`, circles, squares and triangles on a plain ground,
    without weights; or a class of your own, `module:Class`, derived from `ray_ddpo.actors.detection.detector.Detector`."""
    model: str = MASK2FORMER
    """Detection model of `hub`, a folder or a hub name: Mask2Former, a detector such as DETR, or a zero-shot detector
    such as OWLv2 or Grounding DINO."""
    clip: str = CLIP
    """CLIP model of `hub` that names colours: a folder or a hub name."""
    dtype: Precision = "float32"
    """Dtype of the models of `hub`. `auto`: float16 on a GPU, float32 on the CPU."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Confidence above which an object counts. The detectors of `hub` report objects above 0.05 only."""
    counting_threshold: float = Field(default=0.9, ge=0, lt=1)
    """The same for prompts whose `tag` is `counting`."""
    max_objects: int = Field(default=16, ge=1)
    """Most objects of a class that are looked at."""
    max_overlap: float = Field(default=1.0, gt=0, le=1)
    """IoU from which on the less confident of two objects of a class does not count. 1: both count."""
    position_threshold: float = Field(default=POSITION_THRESHOLD, ge=0)
    """Offset, as a share of both objects' sizes, above which one is beside the other."""

    @property
    def memory_bytes(self) -> int:
        return weight_bytes(PARAMETERS, self.dtype) if self.detector == "hub" else 0

    @property
    def independent_of_batch(self) -> bool:
        return self.detector == "shapes"

    @property
    def score_range(self) -> tuple[float, float] | None:
        return (0.0, 1.0) if self.measure != "soft" else None  # a soft score may be below 0

    def needs(self) -> tuple[Weights, ...]:
        return hub_needs(self.model, self.clip) if self.detector == "hub" else ()

    def user_modules(self) -> dict[str, str]:
        own = {"detector": self.detector.partition(":")[0]} if ":" in self.detector else {}
        return {**super().user_modules(), **own}

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        wanted = {prompt.text: requirements(prompt.text, prompt.metadata) for prompt in prompts}
        for text, each in wanted.items():
            if each.most > self.max_objects:
                raise ValueError(
                    f"prompt {text[:200]!r} counts to {each.most}, and reward.max_objects is {self.max_objects}: objects "
                    "beyond it are not looked at; give a higher one"
                )
        asked = {name for each in wanted.values() for name in each.classes}
        if self.detector == "shapes":
            from ray_ddpo.actors.detection.shapes import check_classes

            check_classes(asked)

    def load(self, device: str) -> LoadedReward:
        """Load the detector.

        The loaded reward raises ValueError if a prompt's metadata are not GenEval's, or name an unknown class.
        """
        detector = self._load_detector(device)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            wanted = [requirements(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]
            found = detector.detect(list(images), [each.classes for each in wanted])
            rows = zip(images, found, wanted, strict=True)
            return np.array([self._judge(detector, *row) for row in rows], dtype=np.float32)

        return score

    def _load_detector(self, device: str) -> Detector:
        """Return the detector that the recipe names."""
        if self.detector == "hub":
            return HubDetector(self.model, self.clip, self.dtype, device)
        if self.detector == "shapes":
            from ray_ddpo.actors.detection.shapes import ShapeDetector

            return ShapeDetector(device)
        cls: Any = import_object(self.detector, "reward.detector")
        if not (isinstance(cls, type) and issubclass(cls, Detector)):
            raise ValueError(
                f"reward.detector is {self.detector!r}: it must be derived from Detector in {Detector.__module__}"
            )
        return cls(device)

    def _judge(
        self, detector: Detector, image: np.ndarray, found: dict[str, list[DetectedObject]], wanted: Requirements
    ) -> float:
        """Score one image by the rules."""
        threshold = self.counting_threshold if wanted.tag == COUNTING else self.threshold
        objects = {
            name: kept_objects(of_class, threshold, self.max_objects, self.max_overlap)
            for name, of_class in found.items()
        }

        def colours_of(of_class: Sequence[DetectedObject], name: str) -> list[str]:
            return detector.colours(image, of_class, name)

        if self.measure == "correct":
            return float(is_correct(wanted, objects, colours_of, self.position_threshold))
        score, strict = soft_score(wanted, objects, colours_of, self.position_threshold)
        return float(strict) if self.measure == "strict" else score
