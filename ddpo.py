"""The command line: one verb, one call."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

OVERRIDABLE = ("train", "plan", "doctor", "report", "sample", "replay", "serve-reward", "push")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 where it went well, 1 where a run broke off, a replay differs or the doctor finds a fault, 2 where
    the user has to change something, 3 where a run is whole and was not published.

    128 + its number where a signal stopped it.
    """
    sys.path.append(os.getcwd())  # a user's module:function lies where the command is typed
    parser, overridable = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not overridable(options):
        parser.error(f"ddpo {options.verb} does not know {rest}")
    options.overrides = _overrides(rest)
    try:
        return options.run(options) or 0
    except ValueError as error:
        # An actor's error comes wrapped in Ray's, which prints the whole remote traceback: the user needs its cause.
        print(f"ddpo {options.verb}: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"ddpo {options.verb}: stopped; a run goes on from its last checkpoint with --resume auto", file=sys.stderr
        )
        return 130


def _overrides(rest: list[str]) -> list[str]:
    """`--key=value` and `--key value` alike."""
    parts = []
    for word in rest:
        parts += word.split("=", 1) if word.startswith("--") and "=" in word else [word]
    return parts


def _parser() -> tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], bool]]:
    parser = argparse.ArgumentParser(
        prog="ddpo", description="Fine-tune diffusion models by reinforcement learning on Ray."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("train", help="run a recipe", epilog="--section.key VALUE changes any key of the recipe")
    verb.add_argument("recipe", help="a TOML file, such as deploy/recipes/demo.toml")
    verb.add_argument("--resume", choices=["auto"], help="go on from the run's newest checkpoint, if it has one")
    verb.add_argument("--serial", action="store_true", help="one process, without Ray, for debugging")
    verb.set_defaults(run=_train)

    verb = verbs.add_parser("plan", help="print the sizes that follow from a recipe")
    verb.add_argument("recipe")
    verb.set_defaults(run=_plan)

    verb = verbs.add_parser("doctor", help="say what would go wrong with a recipe here, before it does")
    verb.add_argument("recipe")
    verb.set_defaults(run=_doctor)

    _add_of_living_runs(verbs)

    verb = verbs.add_parser("sample", help="draw pictures with a run's weights")
    verb.add_argument("--lora", required=True, metavar="RUN_OR_PATH", help="a run's folder, or a LoRA file or folder")
    verb.add_argument("--recipe", help="whose model and sampling to use; by default the run's own")
    verb.add_argument("--output", default="samples", help="the folder for the PNGs")
    verb.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next")
    verb.add_argument("prompts", nargs="+", metavar="PROMPT")
    verb.set_defaults(run=_sample)

    verb = verbs.add_parser(
        "report", help="write report.html, before/after pictures, the reward's curve and summary.json"
    )
    verb.add_argument("runs", metavar="RUN", help="a run's folder")
    verb.set_defaults(run=_report)

    verb = verbs.add_parser("replay", help="draw a round again and compare it with the ledger, image by image")
    verb.add_argument("replayed", metavar="RUN", help="a run's folder")
    verb.add_argument("--round", type=int, required=True, help="counted from 0")
    verb.set_defaults(run=_replay)
    _add_push(verbs)
    _add_serve_reward(verbs)
    _add_migrate(verbs)
    _add_fit_aesthetic(verbs)
    return parser, lambda options: options.verb in OVERRIDABLE


def _add_of_living_runs(verbs: Any) -> None:
    verb = verbs.add_parser("scale", help="give a living run another number of samplers or reward workers")
    verb.add_argument("runs", metavar="RUN", help="a run's folder")
    verb.add_argument("--samplers", type=int, metavar="N")
    workers = "of [reward_workers], or NAME=N for a reward with workers of its own; may be given several times"
    verb.add_argument("--reward-workers", action="append", default=[], metavar="N", help=workers)
    verb.set_defaults(run=_scale)

    verb = verbs.add_parser("status", help="say how a run stands, from any shell that sees its folder")
    verb.add_argument("runs", metavar="RUN", help="a run's folder")
    verb.add_argument("--json", action="store_true", help="as one JSON object")
    verb.set_defaults(run=_status)


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
    verb.set_defaults(run=_push)


def _add_serve_reward(verbs: Any) -> None:
    verb = verbs.add_parser("serve-reward", help="score pictures for others: a recipe's reward over HTTP")
    verb.add_argument("recipe")
    verb.add_argument("--reward", metavar="NAME", help="which of the recipe's rewards; needed where it has several")
    verb.add_argument("--host", default="127.0.0.1", help="the address to listen at; by default %(default)s")
    verb.add_argument("--port", type=int, default=8000, help="0: any that is free; by default %(default)s")
    verb.add_argument("--token-variable", metavar="NAME", help="of the environment variable with the token to ask for")
    verb.set_defaults(run=_serve_reward)


def _add_migrate(verbs: Any) -> None:
    verb = verbs.add_parser("migrate", help="turn the DDPOConfig of a run in TRL into a recipe")
    verb.add_argument("config", help="its fields as a JSON object; what is missing has TRL's default")
    verb.add_argument("--processes", type=int, default=1, metavar="N", help="that accelerate had")
    verb.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="by default %(default)s")
    verb.add_argument("--reward", default="aesthetic", help="a name, or module:function; by default %(default)s")
    verb.add_argument("--output", metavar="FILE", help="where to write the recipe; by default it is printed")
    verb.set_defaults(run=_migrate)


def _add_fit_aesthetic(verbs: Any) -> None:
    verb = verbs.add_parser("fit-aesthetic", help="fit an aesthetic head on rated pictures")
    verb.add_argument("pictures", help="the folder that the table's paths begin at")
    verb.add_argument("table", help="csv, parquet, AVA.txt, or json of vote histograms: docs/aesthetic.md")
    verb.add_argument("--output", required=True, metavar="FOLDER", help="goes on with the embeddings that are there")
    verb.add_argument("--clip", default="openai/clip-vit-large-patch14", help="folder or hub name; %(default)s")
    verb.add_argument("--head", choices=["linear", "mlp", "mlp-relu"], default="linear", help="by default %(default)s")
    verb.add_argument("--format", choices=["csv", "parquet", "ava", "json"], help="by default as the table looks")
    verb.add_argument("--split-file", metavar="FILE", help="the test pictures: a path or an id a line")
    verb.add_argument("--validation", type=float, default=0.1, help="share; by default %(default)s")
    verb.add_argument("--test", type=float, default=0.1, help="share, without --split-file; by default %(default)s")
    verb.add_argument("--seed", type=int, default=0, help="of the split and of the MLP's training")
    verb.add_argument("--epochs", type=int, default=50, help="of the MLP; by default %(default)s")
    verb.add_argument("--batch-size", type=int, default=256, help="of the MLP's training; by default %(default)s")
    verb.add_argument("--embedding-batch-size", type=int, default=32, help="of CLIP; by default %(default)s")
    verb.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto", help="of CLIP")
    verb.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    verb.add_argument("--threads", type=int, default=1, help="of torch; by default %(default)s")
    verb.set_defaults(run=_fit_aesthetic)


def _train(options: argparse.Namespace) -> int:
    from common.config import Recipe
    from common.run_folder import RunFolder
    from train import BROKE_OFF, Stopped, train

    recipe = Recipe.load(options.recipe, options.overrides)
    try:
        train(recipe, resume=options.resume == "auto", serial=options.serial)
    except Stopped as stopped:
        print(f"ddpo train: {stopped}; it goes on with --resume auto", file=sys.stderr)
        return stopped.exit_code
    except BROKE_OFF as error:
        cause = getattr(error, "cause", error)
        print(f"ddpo train: {type(cause).__name__}: {cause}", file=sys.stderr)
        return 1
    print(RunFolder(recipe.run_path()).where_everything_lies())
    print(f"{'look at it':<13} ddpo report {recipe.run_path()}")
    return _publish(recipe) if recipe.push.repo else 0


def _publish(recipe: Any) -> int:
    from deploy.commands.push import push
    from deploy.hub import NotPushed

    try:
        print(push(recipe.run_path(), []))
    # RuntimeError: the report's pictures, which this machine may have no memory for.
    except (NotPushed, ValueError, OSError, RuntimeError) as error:
        by_hand = f"ddpo push {recipe.run_path()} {recipe.push.repo}"
        print(f"ddpo train: the run is whole, and was not pushed: {error}; push it with: {by_hand}", file=sys.stderr)
        return 3
    return 0


def _plan(options: argparse.Namespace) -> None:
    from common.config import Recipe
    from deploy.commands.plan import plan

    print(plan(Recipe.load(options.recipe, options.overrides)))


def _doctor(options: argparse.Namespace) -> int:
    from common.config import Recipe
    from deploy.commands.doctor import doctor

    return doctor(Recipe.load(options.recipe, options.overrides))


def _serve_reward(options: argparse.Namespace) -> None:
    from common.config import Recipe
    from deploy.commands.serve_reward import Listening, serve_reward

    listening = Listening(options.host, options.port, options.token_variable)
    serve_reward(Recipe.load(options.recipe, options.overrides), options.reward, listening)


def _sample(options: argparse.Namespace) -> None:
    from deploy.commands.sample import SampleRequest, sample

    request = SampleRequest(options.lora, options.recipe, tuple(options.prompts), options.seed, options.output)
    for path in sample(request, options.overrides):
        print(path)


def _scale(options: argparse.Namespace) -> None:
    from deploy.commands.scale import counts_of, scale

    asked = {} if options.samplers is None else {"samplers": options.samplers}
    print(scale(options.runs, asked | counts_of(options.reward_workers)))


def _status(options: argparse.Namespace) -> None:
    import json

    from deploy.commands.status import in_words, status

    known = status(options.runs)
    print(json.dumps(known) if options.json else in_words(known))


def _report(options: argparse.Namespace) -> None:
    from deploy.commands.report import report

    print(report(options.runs, options.overrides))


def _push(options: argparse.Namespace) -> int:
    import json

    from deploy.commands.push import push
    from deploy.hub import NotPushed

    said = {"repo": options.repo, "revision": options.revision, "version": options.version}
    overrides = [word for key, value in said.items() if value for word in (f"--push.{key}", json.dumps(value))]
    overrides += ["--push.private", "true"] if options.private else []
    try:
        print(push(options.pushed, options.overrides + overrides, options.dry_run))
    except NotPushed as error:
        print(f"ddpo push: not pushed: {error}", file=sys.stderr)
        return 3
    return 0


def _replay(options: argparse.Namespace) -> int:
    from deploy.commands.replay import replay

    replayed = replay(options.replayed, options.round, options.overrides)
    print(replayed.text)
    return 0 if replayed.equal else 1


def _migrate(options: argparse.Namespace) -> None:
    from pathlib import Path

    from deploy.commands.migrate import Beside, migrate, read_config, write_recipe

    beside = Beside(options.processes, options.model, options.reward)
    migrated = migrate(read_config(Path(options.config)), beside)
    print(*migrated.lines, sep="\n", file=sys.stderr)
    if options.output:
        print(write_recipe(Path(options.output), migrated))
    else:
        print(migrated.toml, end="")


def _fit_aesthetic(options: argparse.Namespace) -> None:
    from deploy.commands.fit_aesthetic import fit_aesthetic, request_of

    print(fit_aesthetic(request_of(options)))


if __name__ == "__main__":
    sys.exit(main())
