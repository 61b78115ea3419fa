"""What can be typed after `ddpo`: verbs, their options, and the recipe's keys that some of them take besides."""

import argparse
from collections.abc import Sequence
from typing import Any

OVERRIDABLE = ("train", "plan", "doctor", "report", "evaluate", "sample", "replay", "serve-reward", "push")


def read(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed; `overrides` are the recipe's keys in it. SystemExit: it is no command."""
    reader = parser()
    options, rest = reader.parse_known_args(arguments)
    if rest and options.verb not in OVERRIDABLE:
        reader.error(f"ddpo {options.verb} does not know {rest}")
    options.overrides = _overrides(rest)
    return options


def _overrides(rest: list[str]) -> list[str]:
    """`--key=value` and `--key value` alike."""
    parts = []
    for word in rest:
        parts += word.split("=", 1) if word.startswith("--") and "=" in word else [word]
    return parts


def parser() -> argparse.ArgumentParser:
    """Every verb with its options."""
    parser = argparse.ArgumentParser(
        prog="ddpo", description="Fine-tune diffusion models by reinforcement learning on Ray."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("train", help="run a recipe", epilog="--section.key VALUE changes any key of the recipe")
    verb.add_argument("recipe", help="a TOML file, such as deploy/recipes/demo.toml")
    verb.add_argument("--resume", choices=["auto"], help="go on from the run's newest checkpoint, if it has one")
    from_help = "begin with the weights of an earlier run: its last, those after ROUND, or those under best/ (RUN@best)"
    verb.add_argument("--from", dest="start_from", metavar="RUN[@ROUND]", help=from_help)
    verb.add_argument("--serial", action="store_true", help="one process, without Ray, for debugging")

    verb = verbs.add_parser("plan", help="print the sizes that follow from a recipe")
    verb.add_argument("recipe")

    verb = verbs.add_parser("doctor", help="say what would go wrong with a recipe here, before it does")
    verb.add_argument("recipe")

    _add_of_living_runs(verbs)

    verb = verbs.add_parser("sample", help="sample images with a run's weights")
    verb.add_argument("--lora", required=True, metavar="RUN_OR_PATH", help="a run's folder, or any LoRA file or folder")
    verb.add_argument("--recipe", help="whose model and sampling to use; by default the run's own")
    verb.add_argument("--output", default="samples", help="the folder for the PNGs")
    verb.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next")
    verb.add_argument("prompts", nargs="+", metavar="PROMPT")

    verb = verbs.add_parser(
        "report", help="write report.html, before/after images, the reward's curve and summary.json"
    )
    verb.add_argument("runs", metavar="RUN", help="a run's folder")

    _add_evaluate(verbs)

    verb = verbs.add_parser("replay", help="sample a round again and compare it with the ledger, image by image")
    verb.add_argument("replayed", metavar="RUN", help="a run's folder")
    verb.add_argument("--round", type=int, required=True, help="counted from 0")
    _add_export(verbs)
    _add_push(verbs)
    _add_serve_reward(verbs)
    _add_migrate(verbs)
    _add_fit_aesthetic(verbs)
    return parser


def _add_of_living_runs(verbs: Any) -> None:
    verb = verbs.add_parser("scale", help="give a living run another number of samplers or reward workers")
    verb.add_argument("runs", metavar="RUN", help="a run's folder")
    verb.add_argument("--samplers", type=int, metavar="N")
    workers = "of [reward_workers], or NAME=N for a reward with workers of its own; may be given several times"
    verb.add_argument("--reward-workers", action="append", default=[], metavar="N", help=workers)

    verb = verbs.add_parser("status", help="say how a run stands, from any shell that sees its folder")
    verb.add_argument("runs", metavar="RUN", help="a run's folder")
    verb.add_argument("--json", action="store_true", help="as one JSON object")


def _add_evaluate(verbs: Any) -> None:
    verb = verbs.add_parser(
        "evaluate",
        help="compare weights on the same held-out images, with each other or with the pretrained model",
        epilog="--section.key VALUE changes any key of the recipe, such as evaluation.images and evaluation.prompts",
    )
    verb.add_argument(
        "weights", nargs="+", metavar="WEIGHTS", help="a run's folder, its best/, or a LoRA file or folder"
    )
    verb.add_argument("--against", default="pretrained", metavar="WEIGHTS", help="by default the %(default)s model")
    verb.add_argument("--recipe", help="whose model, prompts, rewards and scorers to use; by default the first run's")
    verb.add_argument(
        "--output", metavar="FOLDER", help="without an earlier result; by default evaluation, evaluation-2, …"
    )


def _add_export(verbs: Any) -> None:
    verb = verbs.add_parser("export", help="write a run's LoRA in the form that other programs read")
    verb.add_argument("exported", metavar="RUN_OR_PATH", help="a run's folder, its best/, or a LoRA of ours")
    verb.add_argument("output", metavar="FILE", help="a .safetensors file that is not there yet")
    verb.add_argument("--format", choices=["kohya"], default="kohya", help="whose names; by default %(default)s")


def _add_push(verbs: Any) -> None:
    verb = verbs.add_parser("push", help="publish a run's weights with a model card on the Hugging Face hub")
    verb.add_argument("pushed", metavar="RUN", help="a run's folder")
    verb.add_argument("repo", metavar="REPO", help="owner/name on the hub; the token is in HF_TOKEN")
    verb.add_argument(
        "--dry-run", metavar="FOLDER", help="write what would be uploaded there, without network or token"
    )
    verb.add_argument("--private", action="store_true", help="for who may read the repository alone")
    verb.add_argument("--revision", metavar="BRANCH", help="made where it is not there; by default main")
    verb.add_argument("--version", choices=["last", "best"], help="the run's own weights, or those under best/")


def _add_serve_reward(verbs: Any) -> None:
    verb = verbs.add_parser("serve-reward", help="score images for others: a recipe's reward over HTTP")
    verb.add_argument("recipe")
    verb.add_argument("--reward", metavar="NAME", help="which of the recipe's rewards; needed where it has several")
    verb.add_argument("--host", default="127.0.0.1", help="the address to listen at; by default %(default)s")
    verb.add_argument("--port", type=int, default=8000, help="0: any that is free; by default %(default)s")
    verb.add_argument("--token-variable", metavar="NAME", help="of the environment variable with the token to ask for")


def _add_migrate(verbs: Any) -> None:
    verb = verbs.add_parser("migrate", help="turn the DDPOConfig of a run in TRL into a recipe")
    verb.add_argument("config", help="its fields as a JSON object; what is missing has TRL's default")
    verb.add_argument("--processes", type=int, default=1, metavar="N", help="that accelerate had")
    verb.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="by default %(default)s")
    verb.add_argument("--reward", default="aesthetic", help="a name, or module:function; by default %(default)s")
    verb.add_argument("--output", metavar="FILE", help="where to write the recipe; by default it is printed")


def _add_fit_aesthetic(verbs: Any) -> None:
    verb = verbs.add_parser("fit-aesthetic", help="fit an aesthetic head on rated images")
    verb.add_argument("images", help="the folder that the table's paths begin at")
    verb.add_argument("table", help="csv, parquet, AVA.txt, or json of vote histograms: docs/aesthetic.md")
    verb.add_argument("--output", required=True, metavar="FOLDER", help="goes on with the embeddings that are there")
    verb.add_argument("--clip", default="openai/clip-vit-large-patch14", help="folder or hub name; %(default)s")
    verb.add_argument("--head", choices=["linear", "mlp", "mlp-relu"], default="linear", help="by default %(default)s")
    verb.add_argument("--format", choices=["csv", "parquet", "ava", "json"], help="by default as the table looks")
    verb.add_argument("--split-file", metavar="FILE", help="the test images: a path or an id a line")
    verb.add_argument("--validation", type=float, default=0.1, help="share; by default %(default)s")
    verb.add_argument("--test", type=float, default=0.1, help="share, without --split-file; by default %(default)s")
    verb.add_argument("--seed", type=int, default=0, help="of the split and of the MLP's training")
    verb.add_argument("--epochs", type=int, default=50, help="of the MLP; by default %(default)s")
    verb.add_argument("--batch-size", type=int, default=256, help="of the MLP's training; by default %(default)s")
    verb.add_argument("--embedding-batch-size", type=int, default=32, help="of CLIP; by default %(default)s")
    verb.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto", help="of CLIP")
    verb.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    verb.add_argument("--threads", type=int, default=1, help="of torch; by default %(default)s")
