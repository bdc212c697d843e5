import dataclasses
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
from sqlalchemy.exc import OperationalError

from normkit.errors import NormRuntimeError
from normkit.experiments import connection, liveness
from normkit.experiments.store import Store, plain


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'trials.db'}"


@pytest.fixture
def opened(url, tmp_path):
    """Open the storage, any number of times; all are closed at the end."""
    made = []

    def open_(**changes):
        made.append(Store("study", "max", **{"url": url, "folder": tmp_path, **changes}))
        return made[-1]

    yield open_
    for store in made:
        store.__exit__(None, None, None)


def wait_until(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def states(url):
    study = optuna.load_study(study_name="study", storage=url)
    return [(trial.state.name, trial.user_attrs.get("failed")) for trial in study.trials]


@pytest.mark.parametrize("where", ["file", "memory"])
def test_what_is_finished_stays_and_comes_back_equal(opened, trial, where):
    result = trial()
    store = opened() if where == "file" else opened(url=None)
    store.finish(store.claim(result.config), result)
    again = opened() if where == "file" else store
    key = result.config.key()
    assert again.finished_keys() == {key}
    assert again.finished({key}) == {key: plain(result)}
    assert again.finished({"other"}) == {}
    assert again.claim(result.config) is None


def test_a_diverged_trial_is_finished_and_pruned(opened, trial, url):
    result = trial(diverged=True)
    store = opened()
    store.finish(store.claim(result.config), result)
    assert store.finished_keys() == {result.config.key()}
    assert states(url) == [("PRUNED", None)]


def test_a_claim_keeps_others_away_until_it_is_given_up(opened, trial):
    config = trial().config
    mine, theirs = opened(), opened()
    number = mine.claim(config)
    assert theirs.claim(config) is None
    assert list(theirs.claimed_elsewhere()) == [config.key()]
    assert mine.claimed_elsewhere() == {}
    mine.give_up(number, "no reason")
    assert theirs.claimed_elsewhere() == {}
    assert theirs.claim(config) is not None


def test_of_two_claims_at_the_same_time_the_later_gives_way(opened, trial, monkeypatch, url):
    """Both look before either writes, as `skip_if_exists` does: only the second look tells them apart."""
    config = trial().config
    pair = opened(), opened()
    barrier = threading.Barrier(2, timeout=20)
    look = Store._claimed_in

    def looked(store, trials):
        found = look(store, trials)
        barrier.wait()
        return found

    monkeypatch.setattr(Store, "_claimed_in", looked)
    claims = [None, None]

    def claim(index):
        claims[index] = pair[index].claim(config)

    threads = [threading.Thread(target=claim, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(number is not None for number in claims) == 1
    assert sorted(states(url), key=str) == [("FAIL", "another process was quicker"), ("RUNNING", None)]


def test_a_result_whose_claim_was_taken_for_dead_is_kept_and_the_first_complete_trial_counts(
    opened, trial, monkeypatch, url
):
    first, second = trial(final=0.1), trial(final=0.2)
    mine, theirs = opened(), opened()
    number = mine.claim(first.config)
    monkeypatch.setattr(Store, "_dead", lambda self, running: {trial._trial_id for trial in running})
    other = theirs.claim(second.config)
    mine.finish(number, first)
    theirs.finish(other, second)
    assert [state for state, _ in states(url)] == ["FAIL", "COMPLETE", "COMPLETE"]
    key = first.config.key()
    found = {store.finished({key})[key].final for store in (mine, theirs)}
    assert found == {0.2}  # the claim of `theirs` came before the second one of `mine`


def test_the_claims_of_a_process_that_died_are_closed(opened, trial, url, tmp_path):
    code = f"""
import sys, os, signal
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from conftest import make_trial
from normkit.experiments.store import Store
store = Store("study", "max", {url!r}, Path({str(tmp_path)!r}))
store.claim(make_trial().config)
os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", code])
    assert died.returncode == -9
    assert states(url) == [("RUNNING", None)]
    store = opened()
    assert store.claim(trial().config) is not None
    assert states(url) == [("FAIL", "its process ended"), ("RUNNING", None)]


def test_leaving_gives_up_what_is_claimed(url, trial, tmp_path):
    def interrupted():
        with Store("study", "max", url, tmp_path) as store:
            store.claim(trial().config)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert states(url) == [("FAIL", "KeyboardInterrupt")]
    assert [path.name for path in tmp_path.iterdir()] == ["trials.db"]


def test_a_claim_that_never_had_a_heartbeat_is_not_for_ever(opened, trial, monkeypatch, url):
    """Its process ended between the announcement and the first beat; Optuna knows nothing of such trials."""
    config = trial().config
    monkeypatch.setattr(liveness.Beats, "start", lambda self: None)
    monkeypatch.setattr(liveness, "_GRACE", 0.5)
    mine, theirs = opened(), opened()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        theirs.claim(config)
    mine._storage._backend.grace_period = 1
    assert mine.claim(config) is None
    wait_until(lambda: mine.claim(config) is not None, 10)


def test_nobody_is_judged_right_after_the_connection_was_lost(opened, trial, monkeypatch):
    config = trial().config
    monkeypatch.setattr(liveness.Beats, "start", lambda self: None)
    mine, theirs = opened(), opened()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        number = theirs.claim(config)
    monkeypatch.setattr(mine._storage, "_get_stale_trial_ids", lambda study: [number])
    mine._beats.missed()
    assert mine.claim(config) is None
    mine._beats._blind_until = 0.0
    assert mine.claim(config) is not None


def test_a_trial_that_ends_its_processes_is_refused_in_the_end(opened, trial, url):
    """And a later command tries it anew."""
    config = trial().config
    store = opened()
    for _ in range(3):
        number = store.claim(config)
        store.give_up(number, "its process ended")
    with pytest.raises(NormRuntimeError, match=r"must leave its process alive; 3 processes ended while training none"):
        store.claim(config)
    assert opened().claim(config) is not None


class Flaky:
    """A connection that is lost: before a call, or after it, when it has done its work."""

    def __init__(self, call, *, after):
        self.call, self.after, self.times = call, after, 2

    def __call__(self, *arguments, **named):
        result = self.call(*arguments, **named) if self.after or not self.times else None
        if self.times:
            self.times -= 1
            raise OperationalError("statement", {}, Exception("server closed the connection"))
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["create_new_trial", "set_trial_user_attr", "set_trial_state_values"])
def test_a_lost_connection_loses_and_doubles_nothing(opened, trial, url, monkeypatch, method, after):
    """Whether the question was lost or the answer nobody knows."""
    monkeypatch.setattr(connection, "_FIRST_WAIT", 0.001)
    store = opened()
    store._connection._patient = True
    monkeypatch.setattr(store._storage, method, Flaky(getattr(store._storage, method), after=after))
    result = trial()
    store.finish(store.claim(result.config), result)
    assert states(url) == [("COMPLETE", None)]
    assert store.finished({result.config.key()}) == {result.config.key(): plain(result)}


def test_a_connection_that_stays_lost_is_said(opened, trial, monkeypatch):
    monkeypatch.setattr(connection, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(connection, "_OUTAGE", 0.1)
    store = opened()
    store._connection._patient = True
    lost = Flaky(None, after=False)
    lost.times = 1000
    monkeypatch.setattr(store._storage, "create_new_trial", lost)
    with pytest.raises(NormRuntimeError, match=r"must be written in .*server closed the connection. hint: .*mend"):
        store.claim(trial().config)
    assert 3 <= 1000 - lost.times <= 5  # 10, 20 and 40 ms apart


def test_many_processes_may_make_the_storage_at_once(url, tmp_path):
    code = f"""
from pathlib import Path
from normkit.experiments.store import Store
Store("study", "max", {url!r}, Path({str(tmp_path)!r})).__exit__(None, None, None)
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(5)]
    for process in running:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "trials.db").write_text("not a database, but long enough to look at" * 50)
    with pytest.raises(
        NormRuntimeError, match=r"trials must be opened in sqlite.*trials\.db; got file is not a database"
    ):
        Store("study", "max", f"sqlite:///{tmp_path / 'trials.db'}", tmp_path)


def test_what_cannot_be_written_is_worded(opened, trial, monkeypatch):
    store = opened()
    number = store.claim(trial().config)

    def full(*arguments):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store._storage, "set_trial_user_attr", full)
    with pytest.raises(NormRuntimeError, match=r"must be written in .*; got database or disk is full. hint: make room"):
        store.finish(number, trial())


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_the_end_of_a_transaction(opened, trial, monkeypatch, sign):
    """Inside one it may be lost, or leave a lock behind; seen once in 25 runs that were stopped at random moments."""
    store = opened()
    number = store.claim(trial().config)
    keep, done = Store._keep, []

    def interrupted(*arguments):
        os.kill(os.getpid(), sign)
        keep(*arguments)
        done.append(True)

    def handle(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "_keep", interrupted)
    before = signal.signal(sign, handle)
    try:
        with pytest.raises(KeyboardInterrupt):
            store.finish(number, trial())
        assert signal.getsignal(sign) is handle
    finally:
        signal.signal(sign, before)
    assert done
    assert store.finished_keys() == {trial().config.key()}


def test_an_unknown_storage_is_named():
    with pytest.raises(NormRuntimeError, match="must be opened in nosuchdb://x"):
        Store("study", "max", "nosuchdb://x")


def test_optunas_own_settings_are_left_alone(opened, trial):
    before = optuna.logging.get_verbosity()
    store = opened()
    store.finish(store.claim(trial().config), trial())
    assert optuna.logging.get_verbosity() == before


def test_every_field_of_a_result_is_kept(trial):
    result = trial()
    for field in dataclasses.fields(result):
        assert field.name in result.to_dict()


def test_claims_hold_from_other_folders_too(url, trial, tmp_path, monkeypatch):
    (tmp_path / "here" / "out").mkdir(parents=True)
    (tmp_path / "there" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with Store("study", "max", url, Path("out")) as mine:
        mine.claim(trial().config)
        monkeypatch.chdir(tmp_path / "there")
        with Store("study", "max", url, Path("out")) as theirs:
            assert theirs.claim(trial().config) is None


def test_passwords_are_hidden():
    assert connection.hidden("postgresql://ann:secret@host/db") == "postgresql://ann:***@host/db"
    assert (
        connection.hidden("normkit compare --storage mysql+x://u:p:q@h")
        == "normkit compare --storage mysql+x://u:***@h"
    )
    assert connection.hidden("sqlite:///a/b.db") == "sqlite:///a/b.db"
