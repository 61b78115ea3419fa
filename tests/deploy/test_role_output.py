"""Roles mark their output lines; the driver separates them from Ray's and keeps them in the run's folder."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest

from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.driver.role_output import LabelledOutput, RoleOutput


def test_each_complete_line_gets_the_label_and_a_progress_bar_its_last_state() -> None:
    plain = io.StringIO()
    output = LabelledOutput(plain, "sampler-0")
    print("one", "two", file=output)
    print("10 %\r", end="", file=output)
    print("100 %\r\nand", end=" ", file=output)
    print("more", file=output)
    print(":actor_name:Sampler", file=output)
    assert plain.getvalue() == "[sampler-0] one two\n[sampler-0] 100 %\n[sampler-0] and more\n:actor_name:Sampler\n"


def test_lines_of_two_threads_are_not_mixed() -> None:
    plain = io.StringIO()
    output = LabelledOutput(plain, "scorer-0")
    output.write("of the ")
    thread = threading.Thread(target=lambda: output.write("another\n"))
    thread.start()
    thread.join()
    output.write("first\n")
    assert plain.getvalue() == "[scorer-0] another\n[scorer-0] of the first\n"


def taken(output: RoleOutput, *lines: str, pid: Any = 7, is_err: bool = True) -> None:
    """Hand lines to the driver as Ray's log stream does."""
    output._take({"ip": "10.0.0.1", "pid": pid, "is_err": is_err, "lines": list(lines)})


def test_rays_lines_stay_off_the_terminal_and_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = RoleOutput(Storage(tmp_path))
    taken(output, "[learner-0]#started as process 7", "[learner-0] mine", "*** SIGSEGV received at time=1 ***")
    taken(output, "[sampler-1] printed", pid=8, is_err=False)
    taken(output, "A worker died or was killed while executing a task", pid="raylet")
    taken(output, "======== Autoscaler status", pid="autoscaler")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("[sampler-1] printed\n", "[learner-0] mine\n")
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept["learner-0.log"] == "started as process 7\nmine\n*** SIGSEGV received at time=1 ***\n"
    assert kept["sampler-1.log"] == "printed\n" and kept["ray.log"].startswith("A worker died") and len(kept) == 3


@pytest.mark.parametrize(
    ("lines", "last_words"),
    [
        (["[learner-0]#exit code 3 (os._exit)"], "exit code 3 (os._exit)"),
        (
            ["Fatal Python error: Segmentation fault", "", f'  File "{__file__}", line 5 in f'],
            f"SIGSEGV in {__file__}:5",
        ),
        (["Fatal Python error: Bus error", '  File "/usr/lib/python3.11/ctypes.py", line 5 in f'], "SIGBUS"),
        (["nothing of that kind"], None),
    ],
)
def test_how_a_process_ended_is_read_from_its_last_lines(
    tmp_path: Path, lines: list[str], last_words: str | None
) -> None:
    output = RoleOutput(Storage(tmp_path))
    taken(output, "[learner-0]#started as process 7", *lines)
    assert output.last_words("learner-0", 0.0) == last_words


def test_a_terminal_that_is_gone_or_a_full_disk_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "logs").write_text("a file where the folder is to be")
    output = RoleOutput(Storage(tmp_path / "logs"))
    for _ in range(2):
        taken(output, "[sampler-0] printed", is_err=False)
    said = capsys.readouterr()
    assert said.out.count("printed") == 2 and said.err.count("what roles print is no longer kept in") == 1
