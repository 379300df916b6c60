"""Processes that outlive their starter: recognised, watched, and stopped with all that they started."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from hubert.core.errors import TransientError
from hubert.core.process import (
    ProcessId,
    exit_status,
    last_lines,
    process_start,
    start_process,
    stop_processes,
    wait_for,
)

# A child in a session of its own that ignores SIGTERM, as a program that hangs would.
STUBBORN = """
    import signal, subprocess, sys, time
    if sys.argv[1:]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("child", flush=True)
    else:
        subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
    time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    records = []

    def start_python(code, name="program"):
        script = tmp_path / f"{name}.py"
        script.write_text(textwrap.dedent(code))
        log = tmp_path / "logs" / f"{name}.log"
        command = [sys.executable, str(script)]
        records.append(start_process(name, command, mark=f"test {tmp_path}", log=log, folder=tmp_path, environment={}))
        return records[-1]

    yield start_python
    stop_processes(records, 0.0)


def printed(record, text):
    return lambda: text in last_lines(record)


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_process_is_stopped_with_a_child_that_ignores_sigterm(start):
    record = start(STUBBORN)
    wait_for({"child": printed(record, "child")}, [record], 30)
    family = [psutil.Process(record.pid), *psutil.Process(record.pid).children()]
    assert len(family) == 2
    assert len(stop_processes([record], 0.5)) == 1
    assert all(is_gone(process) for process in family)
    assert not record.is_alive()


def test_what_a_killed_process_leaves_behind_is_stopped_too(start):
    record = start(STUBBORN)
    wait_for({"child": printed(record, "child")}, [record], 30)
    (orphan,) = psutil.Process(record.pid).children()
    psutil.Process(record.pid).kill()
    psutil.wait_procs([psutil.Process(record.pid)] if psutil.pid_exists(record.pid) else [], timeout=10)
    assert not record.is_alive()
    assert not is_gone(orphan)
    stop_processes([record], 0.5)
    assert is_gone(orphan)


def test_an_id_that_another_program_has_now_is_never_signalled(start):
    stranger = start("import time; time.sleep(600)")
    stale = stranger.model_copy(update={"process": replace(stranger.process, started="1"), "mark": "another"})
    assert not stale.is_alive()
    assert stop_processes([stale], 0.0) == []
    assert stranger.is_alive()


@pytest.mark.parametrize("proc", ["/proc", "/no such folder"])
def test_a_process_is_known_by_its_start_with_and_without_a_proc_file_system(monkeypatch, proc):
    """Without one, as on a Mac, psutil tells it; either way a zombie counts as ended."""
    monkeypatch.setattr("hubert.core.process.PROC", Path(proc))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = ProcessId.of(child.pid)
        assert process.is_alive()
        assert ProcessId.read(json.loads(json.dumps(process.as_dict()))) == process
        assert not replace(process, started="1").is_alive()
        assert not replace(process, host="elsewhere").is_alive()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
        assert not process.is_alive()
    assert process_start(child.pid) is None


def test_a_process_that_ends_while_it_is_waited_for_is_an_error_with_its_own_part_of_the_log(start):
    code = "import sys; print({!r}); sys.exit(3)"
    first = start(code.format("of the first start"))
    with pytest.raises(TransientError, match="of the first start"):
        wait_for({"never": lambda: False}, [first], 30)
    second = start(code.format("of the second start"))
    with pytest.raises(TransientError, match=r"(?s)^program ended with status 3.*program\.log.*of the second") as error:
        wait_for({"never": lambda: False}, [second], 30)
    assert "of the first start" not in str(error.value)
    assert exit_status(second.process) == 3


def test_a_wait_in_vain_names_what_is_not_ready(start):
    record = start("import time; print('still busy', flush=True); time.sleep(600)")
    wait_for({"output": printed(record, "still busy")}, [record], 30)
    with pytest.raises(TransientError, match=r"(?s)^slow: not ready after 0 s.*still busy"):
        wait_for({"quick": lambda: True, "slow": lambda: False}, [record], 0.0)


def test_a_child_of_a_command_that_runs_in_the_background_still_obeys_ctrl_c(tmp_path):
    """A shell starts `command &` with SIGINT ignored; a Prefect worker that inherits that stops on no signal but SIGKILL."""
    show = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    code = f"""
        import signal, sys
        from pathlib import Path
        from hubert.core.process import last_lines, start_process, wait_for
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        command = [sys.executable, "-c", {show!r}]
        log = Path({str(tmp_path / "log")!r})
        record = start_process("show", command, mark="m", log=log, folder=log.parent, environment={{}})
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        wait_for({{"end": lambda: not record.is_alive()}}, [], 30)
        print(last_lines(record))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"
