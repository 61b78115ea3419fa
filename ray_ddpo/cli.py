"""Program `ddpo`: run one verb, turn errors into one line and an exit code."""

import argparse
import errno
import os
import re
import select
import sys
import threading
from collections.abc import Sequence
from typing import Any

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # a write raises them without a file's name
LONGEST_LINE = 2000  # characters of a line of an error message
# Control characters and changes of writing direction.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
NOBODY_READS = 141  # exit code that a shell reports for a program ended by SIGPIPE
INTERRUPTED = 130  # exit code that a shell reports for a program ended by SIGINT
THREADS_SECONDS = 10.0  # time in which threads of the user's code may end


def command() -> None:
    """Run the verb that was typed and end the process, even if the user's code has left threads that do not end."""
    code = main()
    ending = threading.Timer(THREADS_SECONDS, _end_in_spite_of_threads, (code,))
    ending.daemon = True
    ending.start()  # because Python waits for all threads that are not daemons
    sys.exit(code)


def _end_in_spite_of_threads(code: int) -> None:
    """Name the threads that are still running and end the process."""
    named = sorted(thread.name for thread in threading.enumerate() if not thread.daemon)
    named = [name for name in named if name != threading.main_thread().name]
    print(
        f"ddpo: ends without waiting any longer for the threads {named}, which code of your own started",
        file=sys.stderr,
    )
    sys.stdout.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0: success. 1: a run failed, a replay differs, or the doctor found a fault. 2: the user has to change something.
        3: training finished, but the upload failed. 128 + n: stopped by signal n. 141: the output has no reader, as
        after `| head`.
    """
    try:
        try:
            return _verb(arguments)
        finally:
            sys.stdout.flush()  # here, so that a closed pipe is still noticed
    except KeyboardInterrupt:  # before a verb handles it, or while it does
        print("ddpo: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads():  # another pipe broke: an error
            raise
        return NOBODY_READS


def _nobody_reads() -> bool:
    """Return whether stdout or stderr has no reader; drop their further output, or Python would complain at exit."""
    closed = False
    for descriptor in (1, 2):  # stdout and stderr
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            closed = True
    return closed


def _verb(arguments: Sequence[str] | None) -> int:
    """Parse the command line, run the verb, and print an error as one line."""
    sys.path.append(os.getcwd())  # so that a user's module:function is found where the command is typed
    # Imported here, so that Ctrl+C in the first instant prints one line and no traceback, and that --help is fast.
    from ray_ddpo.deploy.commands.command_line import read

    options = read(arguments)
    from ray_ddpo.common.recipe import overrides
    from ray_ddpo.common.run_storage.storage import StorageError
    from ray_ddpo.deploy.driver.registries import REGISTRIES

    overrides.REGISTRIES.update(REGISTRIES)
    try:
        return RUN[options.verb](options) or 0
    except ValueError as error:
        # Ray wraps an actor's error and prints the whole remote traceback. The user needs the cause only.
        print(f"ddpo {options.verb}: {_without_passwords(str(getattr(error, 'cause', error)))}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"ddpo {options.verb}: {_without_passwords(str(error))}", file=sys.stderr)
        return 1 if options.verb == "train" else 2
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:  # no file: nothing that a user could repair
            raise
        print(f"ddpo {options.verb}: {_without_passwords(_of_file(error))}", file=sys.stderr)
        return 1 if options.verb == "train" else 2
    except KeyboardInterrupt:
        advice = "; resume from the last checkpoint with --resume auto" if options.verb == "train" else ""
        print(f"ddpo {options.verb}: stopped{advice}", file=sys.stderr)
        return _left(INTERRUPTED)


def _left(code: int) -> int:
    """Return an exit code, or end the process at once if it is connected to Ray, whose shutdown may hang."""
    from ray_ddpo.deploy.driver.reaper import has_cluster, leave

    if has_cluster():
        leave(code)
    return code


def _of_file(error: OSError) -> str:
    """Return the file of an operating system's error, and what is wrong with it."""
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part)


def _without_passwords(text: str) -> str:
    """Return a message without passwords in URLs and control characters, with long lines cut.

    A message about a wrong value repeats the value, and a job's log keeps it.
    """
    lines = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…" for line in text.split("\n")]
    return re.sub(r"(:/+)[^/\s]*@", r"\1…@", CONTROL_CHARACTERS.sub("?", "\n".join(lines)))


def _train(options: argparse.Namespace) -> int:
    """Train, print the output paths, and upload the weights if the recipe says so."""
    from ray_ddpo.common.recipe.recipe import Recipe
    from ray_ddpo.common.run_storage.run_folder import RunFolder
    from ray_ddpo.deploy.driver.fatal_errors import FATAL_ERRORS
    from ray_ddpo.deploy.driver.start_from import start_from_of
    from ray_ddpo.train import Stopped, run_training

    recipe = Recipe.load(options.recipe, options.overrides)
    if options.start_from:
        recipe = recipe.model_copy(update={"start_from": start_from_of(options.start_from)})
    folder = RunFolder(recipe.run_path())  # before the user's code may change the working directory
    try:
        run_training(recipe, resume=options.resume == "auto", serial=options.serial)
    except Stopped as stopped:
        print(f"ddpo train: {_without_passwords(str(stopped))}; resume with --resume auto", file=sys.stderr)
        return _left(stopped.exit_code) if stopped.cluster_is_lost else stopped.exit_code
    except FATAL_ERRORS as error:
        cause = getattr(error, "cause", error)
        print(f"ddpo train: {type(cause).__name__}: {_without_passwords(str(cause))}", file=sys.stderr)
        return 1
    print(folder.output_paths())
    print(f"{'look at it':<13} ddpo report {recipe.run_path()}")
    return _publish(recipe) if recipe.push.repo else 0


def _publish(recipe: Any) -> int:
    """Upload a finished run's weights; return 3 if that fails."""
    from ray_ddpo.deploy.commands.push import push
    from ray_ddpo.deploy.hub import NotPushed

    try:
        print(push(recipe.run_path(), []))
    # RuntimeError: this machine may lack the memory for the report's images.
    except (NotPushed, ValueError, OSError, RuntimeError) as error:
        by_hand = f"ddpo push {recipe.run_path()} {recipe.push.repo}"
        print(f"ddpo train: training finished, but the upload failed: {error}; upload with: {by_hand}", file=sys.stderr)
        return 3
    return 0


def _config(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.config import config

    print(config(options.section))


def _plan(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.plan.plan import plan, recipe_to_plan

    recipe = recipe_to_plan(options.recipe, options.overrides, options.gpus)
    print(plan(recipe, options.gpus, options.gpu_memory, options.output))


def _doctor(options: argparse.Namespace) -> int:
    from ray_ddpo.common.recipe.recipe import Recipe
    from ray_ddpo.deploy.commands.doctor.doctor import doctor

    return doctor(Recipe.load(options.recipe, options.overrides))


def _serve_reward(options: argparse.Namespace) -> None:
    from ray_ddpo.common.recipe.recipe import Recipe
    from ray_ddpo.deploy.reward_service import serve_reward

    recipe = Recipe.load(options.recipe, options.overrides)
    serve_reward(recipe, options.reward, options.host, options.port, options.token_variable)


def _sample(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.sample import sample

    asked = (options.lora, options.recipe, options.prompts, options.seed, options.output)
    for path in sample(*asked, options.overrides, {"image": options.image, "mask": options.mask}):
        print(path)


def _scale(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.scale import counts_of, scale

    asked = {} if options.samplers is None else {"samplers": options.samplers}
    print(scale(options.runs, asked | counts_of(options.reward_workers)))


def _status(options: argparse.Namespace) -> None:
    import json

    from ray_ddpo.deploy.commands.status import in_words, status

    known = status(options.runs)
    print(json.dumps(known) if options.json else in_words(known))


def _report(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.report.report import report

    print(report(options.runs, options.overrides))


def _evaluate(options: argparse.Namespace) -> None:
    """Evaluate weights on the recipe's held-out images, or on a suite."""
    from ray_ddpo.deploy.commands.evaluate import evaluate
    from ray_ddpo.deploy.commands.suite.suite import evaluate_suite

    if options.suite:
        print(evaluate_suite(options))
        return
    if options.scorers:
        raise ValueError("--scorers is for a suite: name one with --suite, or give --evaluation.scorers")
    print(evaluate(options.weights, options.against, options.recipe, options.output, options.overrides))


def _prompts(options: argparse.Namespace) -> None:
    from pathlib import Path

    from ray_ddpo.deploy.commands.prompt_sets import fetch_set, list_sets

    for line in fetch_set(options.set, Path(options.output)) if options.set else list_sets():
        print(line)


def _export(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.export import export

    print(export(options.exported, options.output))


def _push(options: argparse.Namespace) -> int:
    """Upload a run's weights; options of the verb override the recipe's `[push]`."""
    import json

    from ray_ddpo.deploy.commands.push import push
    from ray_ddpo.deploy.hub import NotPushed

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
    from ray_ddpo.deploy.commands.replay import replay

    text, is_equal = replay(options.replayed, options.round, options.overrides)
    print(text)
    return 0 if is_equal else 1


def _preferences(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.preferences import check_file, write_file

    print(write_file(options.source, options.output) if options.output else check_file(options.source))


def _migrate(options: argparse.Namespace) -> None:
    """Write or print the recipe of a TRL configuration, with notes on stderr."""
    from pathlib import Path

    from ray_ddpo.deploy.commands.migrate.migrate import migrate, read_config, write_recipe

    migrated = migrate(read_config(Path(options.config)), options.processes, options.model, options.reward)
    print(*migrated.lines, sep="\n", file=sys.stderr)
    if options.output:
        print(write_recipe(Path(options.output), migrated))
    else:
        print(migrated.toml, end="")


def _fit_aesthetic(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.fit_aesthetic.fit_aesthetic import fit_aesthetic

    print(fit_aesthetic(options))


RUN = {
    "train": _train,
    "plan": _plan,
    "doctor": _doctor,
    "config": _config,
    "serve-reward": _serve_reward,
    "sample": _sample,
    "scale": _scale,
    "status": _status,
    "report": _report,
    "evaluate": _evaluate,
    "export": _export,
    "push": _push,
    "replay": _replay,
    "preferences": _preferences,
    "prompts": _prompts,
    "migrate": _migrate,
    "fit-aesthetic": _fit_aesthetic,
}


if __name__ == "__main__":
    command()
