"""Nothing lost, nothing counted twice: whatever ends the program, the same command goes on."""

import os
import resource
import signal
import sqlite3

import pytest
from resumable import GRID, LISTED, LRS, NORMS, SEEDS, TRAIN, gone, results, run, times, wait_for


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def start(folder, *more, **options):
    return run(folder, ["compare", "train.py:train", *LISTED, "--workers", "2", *more], **options)


def finish(folder, *more, **options):
    running = start(folder, *more, **options)
    out, err = running.communicate(timeout=120)
    return running.returncode, out, err


def complete(folder):
    """Number of complete trials in the storage, as SQLite sees them."""
    path = folder / "normkit-report" / "trials.db"
    if not path.exists():
        return 0
    with sqlite3.connect(path, timeout=60) as connection:
        try:
            rows = connection.execute("select count(*) from trials where state in ('COMPLETE', 'PRUNED')").fetchone()
        except sqlite3.OperationalError:  # the tables are not there yet
            return 0
    connection.close()
    return rows[0]


def expected():
    base = {"none": 0.5, "batch": 0.8, "layer": 0.7}
    return [
        (norm, lr, seed, pytest.approx(base[norm] - lr / 10 + seed / 100))
        for seed in range(SEEDS)
        for norm in NORMS
        for lr in LRS
    ]


def test_kill_9_at_any_moment(folder):
    """After the first trial and in the middle; then to the end."""
    for moment in (1, 7):
        running = start(folder)
        wait_for(lambda moment=moment: complete(folder) >= moment, running)
        running.kill()
        running.communicate()
        assert gone(running)
        assert not (folder / "normkit-report" / "report.html").exists()
    kept = complete(folder)
    code, out, err = finish(folder)
    assert code == 0, err
    assert f"{GRID} trials, 2 workers, {kept} kept from before" in err
    assert results(folder)[0] == expected()
    assert complete(folder) == GRID  # nothing doubled
    begun, ended = times(folder, "begun"), times(folder, "ended")
    assert set(ended) == set(begun)
    assert sum(begun.values()) <= GRID + 2 * 2  # only what two workers had in hand was repeated, at most
    assert "batch" in out


def test_two_at_once_share_the_work(folder):
    first, second = start(folder), start(folder)
    told = [running.communicate(timeout=120) for running in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), told
    assert results(folder)[0] == expected()
    assert set(times(folder, "begun").values()) == {1}
    assert complete(folder) == GRID
    shown = [out.split("report:")[0] for out, _ in told]
    assert shown[0] == shown[1]


def test_one_of_two_is_killed_and_the_other_takes_over(folder):
    first, second = start(folder), start(folder)
    wait_for(lambda: complete(folder) >= 6, first)
    first.kill()
    _, err = second.communicate(timeout=120)
    first.communicate()
    assert second.returncode == 0, err
    assert results(folder)[0] == expected()
    assert complete(folder) == GRID
    assert sum(times(folder, "begun").values()) <= GRID + 2


@pytest.mark.filterwarnings("ignore:os.fork")  # of JAX, where other tests loaded it; what is forked only sets a limit
def test_a_full_disk(folder):
    """A limit on the size of files stands for it: SQLite is told that its file cannot grow.

    It begins with 115 kB of empty tables and has 156 kB with all trials in it.
    """

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (135_000, resource.RLIM_INFINITY))

    code, out, err = finish(folder, preexec_fn=limit)
    assert code == 1
    assert out == ""
    told = err.strip().splitlines()[-1]
    assert told.startswith("error: the trials must be ")
    assert "finished trials are kept" in told
    assert "Traceback" not in err
    assert 0 < complete(folder) < GRID
    code, _, err = finish(folder)
    assert code == 0, err
    assert results(folder)[0] == expected()
    assert complete(folder) == GRID
    assert sum(times(folder, "ended").values()) <= GRID + 2


def test_ctrl_c_keeps_what_is_finished(folder):
    running = start(folder)
    wait_for(lambda: complete(folder) >= 3, running)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does, to the workers too
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert out == ""
    assert err.endswith("interrupted: finished trials are kept, run the same command again to go on\n")
    assert gone(running)
    kept = complete(folder)
    code, _, err = finish(folder)
    assert code == 0
    assert f"{kept} kept from before" in err
    assert results(folder)[0] == expected()


def test_a_worker_that_dies_ends_the_run_and_loses_nothing(folder):
    (folder / "die").touch()
    code, _, err = finish(folder)
    assert code == 1
    assert "ended with SIGKILL while training" in err
    (folder / "die").unlink()
    code, _, err = finish(folder)
    assert code == 0, err
    assert results(folder)[0] == expected()


def test_what_is_new_is_trained_and_a_changed_file_makes_all_new(folder):
    assert finish(folder, "--seeds", "1")[0] == 0
    code, _, err = finish(folder, "--seeds", "2")
    assert code == 0
    assert f"{GRID // SEEDS} kept from before" in err
    assert set(times(folder, "begun").values()) == {1}
    assert len(times(folder, "begun")) == GRID // SEEDS * 2
    (folder / "train.py").write_text(TRAIN.replace('"batch": 0.8', '"batch": 0.9'))
    code, _, err = finish(folder, "--seeds", "1")
    assert code == 0
    assert "kept from before" not in err
    assert sorted(times(folder, "begun").values()) == [1] * (GRID // SEEDS) + [2] * (GRID // SEEDS)
