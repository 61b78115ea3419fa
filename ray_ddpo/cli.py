"""The command line: one verb, one call."""

import argparse
import errno
import os
import re
import select
import sys
import threading
from collections.abc import Sequence
from typing import Any

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # which a write raises without a file's name
LONGEST_LINE = 2000  # characters of what is said of an error
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]"
)  # control characters and changes of direction
NOBODY_READS = 141  # what a shell says of a program that SIGPIPE has ended
INTERRUPTED = 130  # and of one that SIGINT has ended
THREADS_SECONDS = 10.0  # in which threads of a user's own code may come to their end


def command() -> None:
    """Run the verb that was typed and end the process, also where a user's own code has left threads that do not end."""
    code = main()
    ending = threading.Timer(THREADS_SECONDS, _end_in_spite_of_threads, (code,))
    ending.daemon = True
    ending.start()  # Python waits for all other threads
    sys.exit(code)


def _end_in_spite_of_threads(code: int) -> None:
    named = sorted(thread.name for thread in threading.enumerate() if not thread.daemon)
    named = [name for name in named if name != threading.main_thread().name]
    print(
        f"ddpo: ends without waiting any longer for the threads {named}, which code of your own started",
        file=sys.stderr,
    )
    sys.stdout.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 where it went well, 1 where a run broke off, a replay differs or the doctor finds a fault, 2 where
    the user has to change something, 3 where a run is whole and was not published.

    128 + its number where a signal stopped it, and 141 where nobody reads what it prints any more, as `| head` does.
    """
    try:
        try:
            return _verb(arguments)
        finally:
            sys.stdout.flush()  # here, where it can still be seen that nobody reads
    except KeyboardInterrupt:  # before a verb could say more, or while it said it
        print("ddpo: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads():  # another's pipe, which is a fault
            raise
        return NOBODY_READS


def _nobody_reads() -> bool:
    """Whether what is printed has no reader; then what is left of it is dropped, or Python would complain at its end."""
    closed = False
    for descriptor in (1, 2):  # what is printed and what is complained of
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            closed = True
    return closed


def _verb(arguments: Sequence[str] | None) -> int:
    sys.path.append(os.getcwd())  # a user's module:function lies where the command is typed
    # Here and not above, so that whoever presses Ctrl+C in the first instant sees a line and no trace.
    from ray_ddpo.common.recipe import overrides
    from ray_ddpo.common.run_storage.storage import StorageError
    from ray_ddpo.deploy.commands.command_line import read
    from ray_ddpo.deploy.driver.registries import REGISTRIES

    options = read(arguments)
    overrides.REGISTRIES.update(REGISTRIES)

    try:
        return RUN[options.verb](options) or 0
    except ValueError as error:
        # An actor's error comes wrapped in Ray's, which prints the whole remote traceback: the user needs its cause.
        print(f"ddpo {options.verb}: {_without_passwords(str(getattr(error, 'cause', error)))}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"ddpo {options.verb}: {_without_passwords(str(error))}", file=sys.stderr)
        return 1 if options.verb == "train" else 2
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:  # not of a file: nothing that a user could mend
            raise
        print(f"ddpo {options.verb}: {_without_passwords(_of_file(error))}", file=sys.stderr)
        return 1 if options.verb == "train" else 2
    except KeyboardInterrupt:
        advice = "; a run goes on from its last checkpoint with --resume auto" if options.verb == "train" else ""
        print(f"ddpo {options.verb}: stopped{advice}", file=sys.stderr)
        return _left(INTERRUPTED)


def _left(code: int) -> int:
    """Return an exit code; but end the process at once if it is on Ray, whose shutdown may hang or print a trace of its own."""
    from ray_ddpo.deploy.driver.reaper import has_cluster, leave

    if has_cluster():
        leave(code)
    return code


def _of_file(error: OSError) -> str:
    """Return which file an error of the operating system is about, and what is wrong with it."""
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part)


def _without_passwords(text: str) -> str:
    """What is said of a wrong value repeats it, and goes where a job's log is kept: without what steers a terminal, and cut."""
    lines = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…" for line in text.split("\n")]
    return re.sub(r"(:/+)[^/\s]*@", r"\1…@", STEERING.sub("?", "\n".join(lines)))


def _train(options: argparse.Namespace) -> int:
    from ray_ddpo.common.recipe.recipe import Recipe
    from ray_ddpo.common.run_storage.run_folder import RunFolder
    from ray_ddpo.deploy.driver.fatal_errors import FATAL_ERRORS
    from ray_ddpo.deploy.driver.start_from import start_from_of
    from ray_ddpo.train import Stopped, train

    recipe = Recipe.load(options.recipe, options.overrides)
    if options.start_from:
        recipe = recipe.model_copy(update={"start_from": start_from_of(options.start_from)})
    folder = RunFolder(recipe.run_path())  # before a user's own code may change the working directory
    try:
        train(recipe, resume=options.resume == "auto", serial=options.serial)
    except Stopped as stopped:
        print(f"ddpo train: {_without_passwords(str(stopped))}; resume with --resume auto", file=sys.stderr)
        return _left(stopped.exit_code) if stopped.cluster_is_lost else stopped.exit_code
    except FATAL_ERRORS as error:
        cause = getattr(error, "cause", error)
        print(f"ddpo train: {type(cause).__name__}: {_without_passwords(str(cause))}", file=sys.stderr)
        return 1
    print(folder.where_everything_lies())
    print(f"{'look at it':<13} ddpo report {recipe.run_path()}")
    return _publish(recipe) if recipe.push.repo else 0


def _publish(recipe: Any) -> int:
    from ray_ddpo.deploy.commands.push import push
    from ray_ddpo.deploy.hub import NotPushed

    try:
        print(push(recipe.run_path(), []))
    # RuntimeError: the report's images, which this machine may have no memory for.
    except (NotPushed, ValueError, OSError, RuntimeError) as error:
        by_hand = f"ddpo push {recipe.run_path()} {recipe.push.repo}"
        print(f"ddpo train: the run is whole, and was not pushed: {error}; push it with: {by_hand}", file=sys.stderr)
        return 3
    return 0


def _plan(options: argparse.Namespace) -> None:
    from ray_ddpo.common.recipe.recipe import Recipe
    from ray_ddpo.deploy.commands.plan.plan import plan

    print(plan(Recipe.load(options.recipe, options.overrides)))


def _doctor(options: argparse.Namespace) -> int:
    from ray_ddpo.common.recipe.recipe import Recipe
    from ray_ddpo.deploy.commands.doctor.doctor import doctor

    return doctor(Recipe.load(options.recipe, options.overrides))


def _serve_reward(options: argparse.Namespace) -> None:
    from ray_ddpo.common.recipe.recipe import Recipe
    from ray_ddpo.deploy.reward_service import Listening, serve_reward

    listening = Listening(options.host, options.port, options.token_variable)
    serve_reward(Recipe.load(options.recipe, options.overrides), options.reward, listening)


def _sample(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.sample import SampleRequest, sample

    request = SampleRequest(options.lora, options.recipe, tuple(options.prompts), options.seed, options.output)
    for path in sample(request, options.overrides):
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
    from ray_ddpo.deploy.commands.evaluate import EvaluateRequest, evaluate

    request = EvaluateRequest(tuple(options.weights), options.against, options.recipe, options.output)
    print(evaluate(request, options.overrides))


def _export(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.export import export

    print(export(options.exported, options.format, options.output))


def _push(options: argparse.Namespace) -> int:
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

    replayed = replay(options.replayed, options.round, options.overrides)
    print(replayed.text)
    return 0 if replayed.equal else 1


def _migrate(options: argparse.Namespace) -> None:
    from pathlib import Path

    from ray_ddpo.deploy.commands.migrate.migrate import ScriptSettings, migrate, read_config, write_recipe

    beside = ScriptSettings(options.processes, options.model, options.reward)
    migrated = migrate(read_config(Path(options.config)), beside)
    print(*migrated.lines, sep="\n", file=sys.stderr)
    if options.output:
        print(write_recipe(Path(options.output), migrated))
    else:
        print(migrated.toml, end="")


def _fit_aesthetic(options: argparse.Namespace) -> None:
    from ray_ddpo.deploy.commands.fit_aesthetic.fit_aesthetic import fit_aesthetic, request_of

    print(fit_aesthetic(request_of(options)))


RUN = {
    "train": _train,
    "plan": _plan,
    "doctor": _doctor,
    "serve-reward": _serve_reward,
    "sample": _sample,
    "scale": _scale,
    "status": _status,
    "report": _report,
    "evaluate": _evaluate,
    "export": _export,
    "push": _push,
    "replay": _replay,
    "migrate": _migrate,
    "fit-aesthetic": _fit_aesthetic,
}


if __name__ == "__main__":
    command()
