"""UnifiedReward: alignment, coherence and style of an image, by a model behind an OpenAI-compatible service.

Wang et al. 2025, arXiv 2503.05236. Prompts and patterns are those of the authors' code (CodeGoat24/UnifiedReward, MIT):
`inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py` for version 2.0, and
`inference_qwen/image_generation/qwen_point_score_image_generation.py` for 1.5.
"""

from typing import Literal

from pydantic import Field, model_validator

from ray_ddpo.actors.rewards.judging.answers import NUMBER, ChatAnswer, read_number
from ray_ddpo.actors.rewards.judging.judge import JudgeReward, Question
from ray_ddpo.common.recipe.bounds import Table

LOWEST, HIGHEST = 1.0, 5.0
AXES_PROMPT = (
    "You are presented with a generated image and its associated text caption. "
    "Your task is to analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
FINAL_SCORE_PROMPT = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy "
    "of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
    "Extract key elements from the provided text caption, evaluate their presence in the generated image using the "
    "format: 'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a "
    "score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
# The authors' patterns, but for what may stand behind the number: "4,5", "40%" and "4/10" are not the number 4 or 40.
END = r"(?![\w%]|[.,]\d|\s*/\s*(?!5\b))"
AXIS_PATTERN = r"{axis} Score \(1-5\):\s*(" + NUMBER + ")" + END
FINAL_SCORE_PATTERN = r"Final Score:\**\s*(" + NUMBER + ")" + END


class AxisWeights(Table):
    """Weights of the three axes in the mean."""

    alignment: float = Field(default=1.0, ge=0)
    """Weight of how well the image matches the prompt."""
    coherence: float = Field(default=1.0, ge=0)
    """Weight of how free of glitches the image is."""
    style: float = Field(default=1.0, ge=0)
    """Weight of how beautiful the image is."""

    @model_validator(mode="after")
    def _has_a_weight(self) -> "AxisWeights":
        if not self.alignment + self.coherence + self.style:
            raise ValueError("alignment, coherence and style are all 0: one weight must be above 0")
        return self


class UnifiedReward(JudgeReward):
    """UnifiedReward's rating of an image, from 1 to 5."""

    model: str = "UnifiedReward"
    """Name under which the service knows the model. The authors' scripts serve it as `UnifiedReward`."""
    version: Literal["2.0", "1.5"] = "2.0"
    """Version of the model: 2.0 rates three axes, 1.5 gives one final score."""
    axes: AxisWeights = AxisWeights()
    """Weights of the axes. Only for version 2.0."""
    max_tokens: int = Field(default=4096, ge=1)
    """Longest answer, in tokens."""

    @property
    def score_range(self) -> tuple[float, float]:
        return LOWEST, HIGHEST

    def asked(self) -> list[Question]:
        template = AXES_PROMPT if self.version == "2.0" else FINAL_SCORE_PROMPT
        return [Question(template=template, read=self.read, max_tokens=self.max_tokens)]

    def read(self, answer: ChatAnswer) -> float:
        """Return the rating. Raise UnreadableAnswer if it is not clear."""
        if self.version == "1.5":
            return read_number(answer.text, LOWEST, HIGHEST, FINAL_SCORE_PATTERN)
        weights = self.axes.model_dump()
        ratings = {
            axis: read_number(answer.text, LOWEST, HIGHEST, AXIS_PATTERN.replace("{axis}", axis.capitalize()))
            for axis in weights
        }
        return sum(weights[axis] * ratings[axis] for axis in weights) / sum(weights.values())
