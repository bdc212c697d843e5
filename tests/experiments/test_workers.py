"""Many machines at one storage: nothing lost, nothing counted twice, and the numbers of a single process."""

import collections
import json
import os
import re
import signal
import socket
import sys
import time

import pytest
import servers
from resumable import GRID, LISTED, gone, results, run, times, wait_for

import normkit
from normkit.cli import main
from normkit.errors import MissingExtraError, NormRuntimeError
from normkit.experiments import connection, devices, liveness, verb
from normkit.experiments.config import Config
from normkit.experiments.connection import Connection
from normkit.experiments.machine import Machine
from normkit.experiments.progress import NoProgress
from normkit.experiments.questions import Question
from normkit.experiments.store import Store

# Numbers that only the seed of the trial decides. Nothing ends before the gate is opened; every line names the process
# that stands for a machine, the parent of the one that trains.
TRAIN = """
import os, random, time
here = os.path.dirname(os.path.abspath(__file__))

def train(trial):
    device = os.environ.get("CUDA_VISIBLE_DEVICES")
    def told(what):
        with open(os.path.join(here, what), "a") as file:
            file.write(f"{trial.norm} {trial.lr} {trial.seed} {device} {os.getppid()}\\n")
    told("begun")
    while not os.path.exists(os.path.join(here, "gate")):
        time.sleep(0.01)
    time.sleep(0.05)
    value = {"none": 0.5, "batch": 0.7, "layer": 0.6}[str(trial.norm)]
    for step in (1, 2, 3):
        value += random.random() / 30
        trial.report(step, accuracy=value)
    told("ended")
"""
SMALL = {"norms": ("none", "batch"), "lrs": (0.1,), "seeds": 2, "workers": 1, "show_progress": False}
# Heartbeats of minutes made fractions of seconds.
QUICK = """
from normkit.experiments import connection, liveness, machine
liveness._BEAT, liveness._GRACE, connection._FIRST_WAIT, machine._LOOK = 0.2, 1.5, 0.05, 0.1
from normkit.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def server():
    servers.require()
    made = servers.Server()
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def database(server):
    return server.database()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process on one machine finds."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "train.py").write_text(TRAIN)
    (folder / "gate").touch()
    running = run(folder, ["compare", "train.py:train", *LISTED, "--workers", "1"])
    _, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    return results(folder)


@pytest.fixture
def started():
    """Start commands that end with the test."""
    made = []

    def start(folder, *arguments, **environment):
        made.append(run(folder, arguments, main=QUICK, env={**os.environ, **environment}))
        return made[-1]

    yield start
    for process in made:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def compare(start, folder, url, *more, **environment):
    return start(folder, "compare", "train.py:train", *LISTED, "--storage", url, *more, **environment)


def begun(folder):
    """The machines that train, by what each has in hand; a line that is being written does not count."""
    path = folder / "begun"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {int(line.split()[-1]): line for line in lines}


def count(folder, what):
    """How often each trial was, on whatever machine."""
    found = collections.Counter()
    for line, number in times(folder, what).items():
        found[" ".join(line.split()[:3])] += number
    return found


def states(server, database):
    """How many trials are in each state; those that lost a claim to a quicker process never began."""
    failed = "select a.trial_id, a.value_json from trial_user_attributes a where a.key = 'failed'"
    joined = f"select t.state, f.value_json from trials t left join ({failed}) f on t.trial_id = f.trial_id"
    rows = server.query(joined, database)
    return collections.Counter(str(state) for state, why in rows if why != '"another process was quicker"')


def test_one_of_three_workers_is_killed(server, database, folder, alone, started):
    url = server.url(database)
    asked = compare(started, folder, url, "--workers", "1")
    helpers = [started(folder, "worker", "--storage", url, "--workers", "1", "--wait") for _ in range(3)]
    wait_for(lambda: len(begun(folder)) == 4, [asked, *helpers])
    killed = helpers.pop()
    assert killed.pid in begun(folder)
    killed.kill()
    killed.communicate()
    assert gone(killed)
    (folder / "gate").touch()
    _, err = asked.communicate(timeout=60)
    assert asked.returncode == 0, err
    assert results(folder) == alone  # bit for bit
    assert states(server, database) == {"COMPLETE": GRID, "FAIL": 1}
    again = begun(folder)[killed.pid].split()
    assert count(folder, "begun") == {**dict.fromkeys(count(folder, "ended"), 1), " ".join(again[:3]): 2}
    for helper in helpers:
        os.killpg(helper.pid, signal.SIGINT)
        _, err = helper.communicate(timeout=30)
        assert helper.returncode == 130
        assert err.endswith("interrupted: finished trials are kept, others take up the rest\n")
        assert gone(helper)


def test_two_coordinators_and_the_database_restarted_in_between(server, database, folder, alone, started):
    """Each asks and trains, on two GPUs; while the database is away all finish a trial that they cannot write."""
    url = server.url(database)
    both = [compare(started, folder, url, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b") for _ in range(2)]
    wait_for(lambda: len(begun(folder)) == 2 and sum(count(folder, "begun").values()) == 4, both)
    server.stop()
    (folder / "gate").touch()
    wait_for(lambda: (folder / "ended").exists() and sum(count(folder, "ended").values()) == 4, both)
    time.sleep(0.5)
    server.start()
    told = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert results(folder) == alone
    assert states(server, database) == {"COMPLETE": GRID}
    assert set(count(folder, "begun").values()) == {1}
    seen = {tuple(line.split()[-2:]) for line in times(folder, "begun")}
    assert sorted(device for device, _ in seen) == ["GPU-a", "GPU-a", "GPU-b", "GPU-b"]
    shown = [out.split("report:")[0] for out, _ in told]
    assert shown[0] == shown[1]


def test_a_beating_trial_lives_and_a_silent_one_is_dead(server, database, trial, monkeypatch):
    monkeypatch.setattr(liveness, "_BEAT", 0.05)
    monkeypatch.setattr(liveness, "_GRACE", 0.5)
    config = trial().config
    with Store("study", "max", server.url(database)) as mine, Store("study", "max", server.url(database)) as theirs:
        number = theirs.claim(config)
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            assert mine.claim(config) is None
        assert list(mine.claimed_elsewhere().values()) == [f"process {os.getpid()} on {socket.gethostname()}"]
        theirs._beats.stop()
        until = time.monotonic() + 5
        while (taken := mine.claim(config)) is None:
            assert time.monotonic() < until
        # It was not dead, only slow: what it brings is kept, and the first complete trial counts.
        theirs.finish(number, trial(final=0.25))
        mine.finish(taken, trial(final=0.75))
        assert {store.finished({config.key()})[config.key()].final for store in (mine, theirs)} == {0.75}
    assert states(server, database) == {"COMPLETE": 2, "FAIL": 1}


def test_a_database_that_stays_away_is_said_and_nothing_is_lost(server, database, trial, monkeypatch):
    monkeypatch.setattr(connection, "_OUTAGE", 0.3)
    monkeypatch.setattr(connection, "_FIRST_WAIT", 0.05)
    url, first, second = server.url(database), trial(), trial(seed=1)
    store = Store("study", "max", url)
    store.finish(store.claim(first.config), first)
    number = store.claim(second.config)
    server.stop()
    try:
        with pytest.raises(NormRuntimeError, match=r"must be written in postgresql://.*; got .*onnection.*mend"), store:
            store.finish(number, second)
        with pytest.raises(NormRuntimeError, match="must be opened in postgresql://"):
            Store("study", "max", url)
    finally:
        server.start()
    with Store("study", "max", url) as again:
        assert again.finished_keys() == {first.config.key()}


@pytest.fixture
def asked(folder, monkeypatch):
    """Ask a question in an SQLite file whose trials nobody does: the process that asked was interrupted."""

    def ask(model="train.py:train"):
        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.chdir(folder)
        url = f"sqlite:///{folder / 'trials.db'}"
        with monkeypatch.context() as patch:
            patch.setattr(verb, "run_trials", interrupt)
            with pytest.raises(KeyboardInterrupt):
                normkit.compare(model, storage=url, **SMALL)
        return url

    return ask


def helped(url):
    """How many trials a worker trained, and what it said it cannot help with."""
    said = []
    with Machine(url, 1, NoProgress(), said.append) as machine:
        return machine.work(), list(map(str, said))


def test_a_worker_needs_nobody_who_asked(asked, folder, monkeypatch):
    """From another folder, where a file of that name lies."""
    url = asked()
    (folder / "elsewhere").mkdir()
    (folder / "train.py").rename(folder / "elsewhere" / "train.py")
    (folder / "elsewhere" / "gate").touch()
    monkeypatch.chdir(folder / "elsewhere")
    assert helped(url) == (4, [])
    assert helped(url) == (0, [])
    assert set(count(folder / "elsewhere", "ended").values()) == {1}
    found = normkit.compare("train.py:train", storage=url, **SMALL)
    assert found.environment["started"] == 0
    assert len(found.trials) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            TRAIN + "# changed",
            r"train\.py must be the same here as where the comparison was asked; got another content",
        ),
        (None, r"train\.py must be on this machine too; got no such file. hint: copy it to "),
    ],
)
def test_other_code_is_refused_before_it_is_run(asked, folder, content, said):
    url = asked()
    (folder / "train.py").unlink()
    if content:
        (folder / "train.py").write_text(content)
    trained, reasons = helped(url)
    assert (trained, len(reasons)) == (0, 1)
    assert re.search(said, reasons[0])
    assert not (folder / "begun").exists()


def test_what_a_file_imports_must_be_the_same_too(asked, folder):
    (folder / "train.py").write_text("import further\n" + TRAIN)
    (folder / "further.py").write_text("a = 1\n")
    url = asked()
    (folder / "further.py").write_text("a = 2\n")
    trained, reasons = helped(url)
    assert trained == 0
    assert "the code of train.py:train must be the same here" in reasons[0]
    assert "further.py" in reasons[0]


def test_a_function_of_python_is_left_to_its_process(asked):
    def mine(trial):
        trial.report(1, loss=1.0)

    trained, reasons = helped(asked(mine))
    assert trained == 0
    assert "mine must be in a file for other machines to use it" in reasons[0]


def test_a_question_survives_json_and_one_of_another_version_is_refused():
    config = Config(model="mlp", norms=("none",), conditions=({}, {"label_noise": 0.3}), batch_sizes=(8,))
    question = Question(config, (("a.py", "f"),), "c", "d", ("k", "l"))
    plain = json.loads(json.dumps(question.to_dict()))
    assert Question.from_dict(plain) == question
    with pytest.raises(NormRuntimeError, match=r"must come from a normkit like this one; got .*unheard"):
        Question.from_dict({**plain, "config": {**plain["config"], "unheard": 1}})


def test_the_command_says_why_it_cannot_help(asked, folder, capsys):
    url = asked()
    (folder / "train.py").unlink()
    assert main(["worker", "--storage", url]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == ["left to others", "error"]
    assert main(["worker", "--storage", f"sqlite:///{folder / 'empty.db'}"]) == 0
    assert capsys.readouterr().out == f"0 trials trained here, none left to claim in sqlite:///{folder / 'empty.db'}\n"
    assert main(["worker", "--storage", url, "--workers", "0"]) == 2


def test_gpus_are_counted_without_cuda(tmp_path, monkeypatch):
    """By the environment, else by the driver's own program."""
    for value, found in (("0,1", ("0", "1")), ("GPU-a", ("GPU-a",)), ("", ()), ("-1", ())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert devices.gpus() == found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho GPU-one\necho GPU-two\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.gpus() == ("GPU-one", "GPU-two")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert devices.gpus() == ()


@pytest.mark.parametrize(
    ("changes", "found", "size"),
    [
        ({"run": "t.py:train"}, ("0", "1", "2"), 3),
        ({"model": "mlp", "framework": "nnx"}, ("0", "1", "2"), 3),
        ({"model": "mlp"}, ("0", "1", "2"), devices.cores()),  # stays on the CPU
        ({"run": "t.py:train"}, ("0",), devices.cores()),  # as without GPUs: nothing to be spread
        ({"run": "t.py:train"}, (), devices.cores()),
    ],
)
def test_one_process_per_gpu_where_there_are_several(changes, found, size):
    assert devices.crew_size(None, Config(**changes), found) == size
    assert devices.crew_size(7, Config(**changes), found) == 7


def test_a_missing_driver_names_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    said = r"postgresql://ann:\*\*\*@host/db needs psycopg2?, which is not installed.*normkit\[postgresql\]"
    with pytest.raises(MissingExtraError, match=said):
        Connection("postgresql://ann:secret@host/db")
