"""Questions to a vision-language model behind an OpenAI-compatible service, such as vLLM's or SGLang's."""

import re
from typing import Literal

from pydantic import Field, model_validator

from ray_ddpo.actors.rewards.judging.answers import (
    ChatAnswer,
    UnreadableAnswer,
    read_json_number,
    read_number,
    read_yes_or_no,
    yes_probability,
)
from ray_ddpo.actors.rewards.judging.judge import JudgeReward, Question
from ray_ddpo.common.recipe.bounds import Table

DEFAULT_QUESTION = 'Does this image show "{prompt}"? Answer yes or no.'
EDIT_QUESTION = (
    'The last image was made from what stands before it by the instruction "{prompt}". Does the last image follow the '
    "instruction, and keep what it does not ask to change? Answer yes or no."
)


class JudgeQuestion(Table):
    """Question about each image. Its answer becomes a score from 0 to 1."""

    text: str = Field(default=DEFAULT_QUESTION, min_length=1)
    """Question. `{prompt}` stands for the prompt, `{field}` for a field of its metadata."""
    answer: Literal["yes_no", "number", "json"] = "yes_no"
    """Form of the answer: yes or no; a number; or a JSON object with a number."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of this question in the mean."""
    log_probs: bool = True
    """Score of a yes-or-no answer: probability of yes by the service's log-probs; else 1 or 0 by the text."""
    lowest: float = 0.0
    """Number that becomes the score 0."""
    highest: float = 10.0
    """Number that becomes the score 1."""
    field: str = "score"
    """Field of the JSON object that holds the number."""
    pattern: str | None = None
    """Regular expression with one group, for a number inside of text. By default the answer is only the number."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer, in tokens. A yes-or-no question that is scored by log-probs needs one token."""

    @model_validator(mode="after")
    def _can_be_read(self) -> "JudgeQuestion":
        """Refuse a scale or a pattern from which no score can be read."""
        if self.lowest >= self.highest:
            raise ValueError(f"lowest is {self.lowest:g}: it must be below highest, {self.highest:g}")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern is {self.pattern!r}: it is no regular expression ({error})") from None
            if groups != 1:
                raise ValueError(f"pattern is {self.pattern!r}: it must have one group, and has {groups}")
        return self

    @property
    def uses_log_probs(self) -> bool:
        """Return whether the answer is scored by log-probs."""
        return self.answer == "yes_no" and self.log_probs

    def read(self, answer: ChatAnswer) -> float:
        """Return the score from 0 to 1. Raise UnreadableAnswer if the answer is not clear."""
        if not answer.text.strip() and not self.uses_log_probs:
            raise UnreadableAnswer("it is empty")
        if self.answer == "yes_no":
            return yes_probability(answer.first_token) if self.log_probs else read_yes_or_no(answer.text)
        if self.answer == "json":
            number = read_json_number(answer.text, self.field, self.lowest, self.highest)
        else:
            number = read_number(answer.text, self.lowest, self.highest, self.pattern)
        return (number - self.lowest) / (self.highest - self.lowest)


class VlmJudge(JudgeReward):
    """Answers of a vision-language model to questions about the image, as a score from 0 to 1."""

    questions: tuple[JudgeQuestion, ...] = ()
    """Questions about each image. The score is their weighted mean. By default one: does the image show the prompt?"""
    show_input: bool = False
    """Show the prompt's input images before the image. The default question is then whether the edit follows the prompt."""

    @property
    def shows_input(self) -> bool:
        return self.show_input

    @property
    def score_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def asked(self) -> list[Question]:
        default = JudgeQuestion(text=EDIT_QUESTION) if self.show_input else JudgeQuestion()
        return [
            Question(
                template=question.text,
                read=question.read,
                weight=question.weight,
                max_tokens=1 if question.uses_log_probs else question.max_tokens,
                log_probs=question.uses_log_probs,
            )
            for question in self.questions or (default,)
        ]
