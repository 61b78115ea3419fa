"""Run TRL's own DDPO, one round for each input line. It runs in TRL's environment and imports nothing of this project.

Usage: python trl_rounds.py JOB.json. The job has "model" (a folder in diffusers' format), "config" (keys of
DDPOConfig), "prompts" to sample from, "device" ("cpu" or "cuda") and "threads" of torch.
`round_process.py` describes input and output. No code of TRL is replaced; its methods are timed from outside.
"""

import io
import json
import os
import random
import resource
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

QUALITY = 95  # of JPEG, as in the paper's code
LIBRARIES = ("trl", "torch", "diffusers", "transformers", "peft", "accelerate")


class TimedTrainer(DDPOTrainer):
    """TRL's trainer with a clock around its methods."""

    seconds: dict[str, float]
    reward: float  # mean of the round's images

    def round(self, index: int) -> dict[str, float]:
        """Run one epoch of TRL: sampling, scoring and learning."""
        self.seconds = {"sampling": 0.0, "scoring": 0.0, "learning": 0.0}
        started = self.now()
        self.step(index, index)
        return {**self.seconds, "round": self.now() - started, "reward": self.reward}

    def now(self) -> float:
        """Return the clock after the device has finished its work."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _generate_samples(self, *given: Any, **named: Any) -> Any:
        started = self.now()
        result = super()._generate_samples(*given, **named)
        self.seconds["sampling"] += self.now() - started
        return result

    def compute_rewards(self, *given: Any, **named: Any) -> Any:
        started = self.now()
        rewards, metadata = super().compute_rewards(*given, **named)
        self.seconds["scoring"] += self.now() - started
        self.reward = float(torch.cat(rewards).mean())
        return rewards, metadata

    def _train_batched_samples(self, *given: Any, **named: Any) -> Any:
        started = self.now()
        result = super()._train_batched_samples(*given, **named)
        self.seconds["learning"] += self.now() - started
        return result

    def save(self, path: Path) -> None:
        """Save the adapters under the network's own names, which are those of the program."""
        named = self.accelerator.unwrap_model(self.sd_pipeline.unet).named_parameters()
        save_file(
            {name: value.detach().float().cpu().contiguous() for name, value in named if value.requires_grad}, path
        )

    def peak_bytes(self) -> int:
        """Return the peak memory: on the GPU, or resident in this process."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compressibility(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
    """Return minus the size of each image's JPEG file in kilobytes."""
    pixels = (images.detach().float().cpu().numpy() * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    sizes = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return -torch.tensor(sizes), {}


def trainer_of(job: dict[str, Any]) -> TimedTrainer:
    """Return TRL's trainer for the job."""
    PartialState(cpu=job["device"] == "cpu")  # otherwise TRL's pipeline fails on its warning about a missing LoRA
    config = DDPOConfig(save_freq=10**6, accelerator_kwargs={"cpu": job["device"] == "cpu"}, **job["config"])
    torch.manual_seed(config.seed)  # TRL seeds itself only after the adapters have their first values
    chosen = random.Random(config.seed)
    pipeline = DefaultDDPOStableDiffusionPipeline(job["model"])
    return TimedTrainer(config, compressibility, lambda: (chosen.choice(job["prompts"]), {}), pipeline)


def main(path: Path) -> None:
    """Load, report readiness, and answer each line."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    trainer = trainer_of(job)
    print(json.dumps({"ready": True, "versions": {name: version(name) for name in LIBRARIES}}), file=answers)
    for index, line in enumerate(sys.stdin):
        asked = json.loads(line)
        result = trainer.round(index)
        if asked.get("save"):
            trainer.save(Path(asked["save"]))
        print(json.dumps({**result, "peak_bytes": trainer.peak_bytes()}), file=answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
