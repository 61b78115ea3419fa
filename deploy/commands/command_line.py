"""Command line of `ddpo`: its verbs, their options, and overrides of the recipe's keys.

argparse, not typer: click takes the override in `ddpo sample … cat --sampling.num_steps 5` for two more prompts.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

OVERRIDABLE = ("train", "plan", "doctor", "report", "evaluate", "sample", "replay", "serve-reward", "push")
# Sections of a recipe, written down here so that `ddpo train --help` need not import the recipe's tables.
SECTIONS = (
    *("start_from", "policy", "prompts", "sampling", "samplers", "reward", "rewards", "aggregation"),
    *("reward_workers", "algorithm", "learner", "runtime", "checkpoint", "rollouts", "evaluation", "guard"),
    *("push", "media", "trackers"),
)


def read(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `overrides` are the recipe's keys in it.

    Raises:
        SystemExit: It is no command.
    """
    reader = parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(reader)
    options, rest = reader.parse_known_args(arguments)
    if rest and options.verb not in OVERRIDABLE:
        reader.error(f"ddpo {options.verb} does not know {rest}")
    options.overrides = []
    for word in rest:  # --key=value is --key and value
        options.overrides += word.split("=", 1) if word.startswith("--") else [word]
    return options


def _add_recipe(verb: argparse.ArgumentParser) -> None:
    """Add an argument for a recipe, which shells complete to shipped names and TOML files."""
    recipe: Any = verb.add_argument(
        "recipe", help="a TOML file, or the name of a shipped recipe, such as demo or tiny/grpo"
    )
    recipe.completer = _recipes


def _recipes(prefix: str, **_: Any) -> list[str]:
    """Return shipped recipes and TOML files that complete a prefix."""
    from argcomplete.completers import FilesCompleter

    from ray_ddpo.common.recipe.shipped import shipped_recipes

    return [*(name for name in shipped_recipes() if name.startswith(prefix)), *FilesCompleter(["toml"])(prefix)]


def _sections(prefix: str, **_: Any) -> list[str]:
    """Return sections, and components of a section whose dot is typed, that complete a prefix."""
    section, dot, _rest = prefix.partition(".")
    if not dot:
        return [name for name in SECTIONS if name.startswith(prefix)]
    from ray_ddpo.deploy.commands.config import registry_of

    names = (registry_of(section) or {}) if section in SECTIONS else {}
    return [found for name in names if (found := f"{section}.{name}").startswith(prefix)]


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs with their options."""
    parser = argparse.ArgumentParser(
        prog="ddpo",
        description="Fine-tune diffusion models by reinforcement learning on Ray.",
        epilog='Complete verbs and recipes in bash or zsh: eval "$(register-python-argcomplete ddpo)"',
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    _add_recipe_verbs(verbs)
    _add_run_verbs(verbs)
    _add_weight_verbs(verbs)
    _add_service_verbs(verbs)
    return parser


def _add_recipe_verbs(verbs: Any) -> None:
    """Add the verbs that take a recipe, and the one that explains its keys."""
    epilog = (
        "--section.key VALUE overrides any key of the recipe, such as --learner.learning_rate 1e-4 or --rounds 20. "
        f"Sections: {', '.join(SECTIONS)}. `ddpo config` explains them, `ddpo config SECTION` prints the keys of one "
        "with type, default, bounds and meaning, `ddpo config algorithm.grpo` those of a component."
    )
    verb = verbs.add_parser("train", help="run a recipe", epilog=epilog)
    _add_recipe(verb)
    verb.add_argument("--resume", choices=["auto"], help="resume from the run's newest checkpoint, if it has one")
    from_help = "start from the weights of an earlier run: its last, those after ROUND, or those under best/ (RUN@best)"
    verb.add_argument("--from", dest="start_from", metavar="RUN[@ROUND]", help=from_help)
    verb.add_argument("--serial", action="store_true", help="one process, without Ray, for debugging")

    verb = verbs.add_parser("plan", help="print the batch sizes, the memory and the balance of a recipe")
    _add_recipe(verb)
    verb.add_argument("--gpus", type=int, metavar="N", help="print the best layout of N GPUs and its recipe lines")
    verb.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GB", help="memory of each of them; by default %(default)g"
    )
    verb.add_argument("--output", metavar="FILE", help="write the recipe with that layout to a file")

    verb = verbs.add_parser("doctor", help="check what would go wrong with a recipe on this machine")
    _add_recipe(verb)

    verb = verbs.add_parser("config", help="explain the keys of a recipe: type, default, bounds, meaning")
    section_help = (
        "such as sampling; algorithm.grpo or reward.module:Class for a component's keys; recipes for a list of those "
        "that ship; by default an overview"
    )
    section: Any = verb.add_argument("section", nargs="?", metavar="SECTION", help=section_help)
    section.completer = _sections


def _add_run_verbs(verbs: Any) -> None:
    """Add the verbs that look at a run or change it."""
    verb = verbs.add_parser("scale", help="change the number of samplers or reward workers of an active run")
    verb.add_argument("runs", metavar="RUN", help="a run's folder")
    verb.add_argument("--samplers", type=int, metavar="N")
    workers = "number for [reward_workers], or NAME=N for a reward with its own workers; may be given several times"
    verb.add_argument("--reward-workers", action="append", default=[], metavar="N", help=workers)

    verb = verbs.add_parser("status", help="print a run's progress, from any shell that sees its folder")
    verb.add_argument("runs", metavar="RUN", help="a run's folder")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = verbs.add_parser("sample", help="sample images with a run's weights")
    verb.add_argument("--lora", required=True, metavar="RUN_OR_PATH", help="a run's folder, or any LoRA file or folder")
    verb.add_argument("--recipe", help="recipe whose model and sampling to use; by default the run's own")
    verb.add_argument("--output", metavar="FOLDER", help="folder for the PNGs; by default samples in the run's folder")
    verb.add_argument(
        "--seed", type=int, default=0, help="seed of the first image; each further image has the next one"
    )
    verb.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        help="image that an editing family changes as each prompt says; repeated, if it reads several",
    )
    verb.add_argument("--mask", metavar="FILE", help="its mask for inpainting: white where the image may change")
    verb.add_argument("prompts", nargs="+", metavar="PROMPT")

    verb = verbs.add_parser("report", help="write report.html, before/after images, the reward curve and summary.json")
    verb.add_argument("runs", metavar="RUN", help="a run's folder")


def _add_weight_verbs(verbs: Any) -> None:
    """Add the verbs that compare, check, convert and publish weights."""
    verb = verbs.add_parser(
        "evaluate",
        help="compare weights on the same held-out images, with each other or with the pretrained model",
        epilog="--section.key VALUE overrides any key of the recipe, such as evaluation.images and evaluation.prompts",
    )
    verb.add_argument(
        "weights", nargs="+", metavar="WEIGHTS", help="a run's folder, its best/, or a LoRA file or folder"
    )
    verb.add_argument("--against", default="pretrained", metavar="WEIGHTS", help="by default the %(default)s model")
    recipe_help = "recipe whose model, prompts, rewards and scorers to use; by default the first run's"
    verb.add_argument("--recipe", help=recipe_help)
    output_help = "folder without an earlier result; by default evaluation, evaluation-2, … in the first run's folder"
    verb.add_argument("--output", metavar="FOLDER", help=output_help)
    suite_help = (
        "prompts, images a prompt and scorers of a standard suite: ocr, geneval, pickscore, drawbench, words, shapes"
    )
    verb.add_argument("--suite", metavar="SUITE", help=suite_help)
    verb.add_argument(
        "--prompts-from", metavar="FOLDER", default="prompts", help="where `ddpo prompts` wrote a suite's prompts"
    )
    scorers_help = "other scorers for the suite, as `--rewards` of a recipe: '[{ name = \"pickscore\" }]'"
    verb.add_argument("--scorers", metavar="LIST", help=scorers_help)

    verb = verbs.add_parser("replay", help="re-sample a round and compare it with the ledger, image by image")
    verb.add_argument("replayed", metavar="RUN", help="a run's folder")
    verb.add_argument("--round", type=int, required=True, help="index of the round, from 0")

    preferences_help = "write the best and worst images of a run's groups as a preference file, or check such a file"
    verb = verbs.add_parser("preferences", help=preferences_help)
    verb.add_argument("source", metavar="RUN_OR_FILE", help="a run's folder; without --output, a file to check")
    verb.add_argument("--output", metavar="FILE", help="a .parquet or .jsonl file that does not exist yet")

    verb = verbs.add_parser("export", help="write a run's LoRA in a format that other programs read")
    verb.add_argument("exported", metavar="RUN_OR_PATH", help="a run's folder, its best/, or a LoRA of this program")
    verb.add_argument("output", metavar="FILE", help="a .safetensors file that does not exist yet")
    verb.add_argument(
        "--format", choices=["kohya"], default="kohya", help="format of the names; by default %(default)s"
    )

    verb = verbs.add_parser("push", help="publish a run's weights with a model card on the Hugging Face hub")
    verb.add_argument("pushed", metavar="RUN", help="a run's folder")
    verb.add_argument("repo", metavar="REPO", help="owner/name on the hub; the token is in HF_TOKEN")
    verb.add_argument("--dry-run", metavar="FOLDER", help="write the files to this folder instead of uploading them")
    verb.add_argument("--private", action="store_true", help="create the repository as a private one")
    verb.add_argument("--revision", metavar="BRANCH", help="branch, created if it does not exist; by default main")
    verb.add_argument("--version", choices=["last", "best"], help="the run's last weights, or those under best/")


def _add_service_verbs(verbs: Any) -> None:
    """Add the verbs around a training: prompt sets, the reward service, TRL's configurations, aesthetic heads."""
    verb = verbs.add_parser("prompts", help="list the sets of prompts, or fetch a published one as JSONL")
    verb.add_argument("set", nargs="?", metavar="SET", help="the published set to fetch; by default all are listed")
    verb.add_argument(
        "--output", metavar="FOLDER", default="prompts", help="folder of the files; by default %(default)s"
    )

    verb = verbs.add_parser("serve-reward", help="serve a recipe's reward over HTTP")
    _add_recipe(verb)
    verb.add_argument("--reward", metavar="NAME", help="one of the recipe's rewards; needed if it has several")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen at; by default %(default)s")
    verb.add_argument("--port", type=int, default=8000, help="0: any free port; by default %(default)s")
    verb.add_argument(
        "--token-variable", metavar="NAME", help="environment variable with the token that clients must send"
    )

    verb = verbs.add_parser("migrate", help="turn the DDPOConfig of a run in TRL into a recipe")
    verb.add_argument("config", help="its fields as a JSON object; a missing field has TRL's default")
    verb.add_argument("--processes", type=int, default=1, metavar="N", help="number of processes of accelerate")
    verb.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="by default %(default)s")
    verb.add_argument("--reward", default="aesthetic", help="a name, or module:function; by default %(default)s")
    verb.add_argument("--output", metavar="FILE", help="file of the recipe; by default it is printed")

    verb = verbs.add_parser("fit-aesthetic", help="fit an aesthetic head on rated images")
    verb.add_argument("images", help="folder that the table's paths are relative to")
    verb.add_argument("table", help="csv, parquet, AVA.txt, or json of vote histograms: docs/aesthetic.md")
    verb.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder of the head; embeddings in it are used again"
    )
    verb.add_argument("--clip", default="openai/clip-vit-large-patch14", help="folder or hub name; %(default)s")
    verb.add_argument("--head", choices=["linear", "mlp", "mlp-relu"], default="linear", help="by default %(default)s")
    verb.add_argument("--format", choices=["csv", "parquet", "ava", "json"], help="by default detected")
    verb.add_argument("--split-file", metavar="FILE", help="test images: a path or an id per line")
    verb.add_argument("--validation", type=float, default=0.1, help="fraction; by default %(default)s")
    verb.add_argument("--test", type=float, default=0.1, help="fraction, without --split-file; by default %(default)s")
    verb.add_argument("--seed", type=int, default=0, help="seed of the split and of the MLP's training")
    verb.add_argument("--epochs", type=int, default=50, help="epochs of the MLP; by default %(default)s")
    verb.add_argument("--batch-size", type=int, default=256, help="batch size of the MLP; by default %(default)s")
    verb.add_argument("--embedding-batch-size", type=int, default=32, help="batch size of CLIP; by default %(default)s")
    verb.add_argument(
        "--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto", help="dtype of CLIP"
    )
    verb.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    verb.add_argument("--threads", type=int, default=1, help="threads of torch; by default %(default)s")
