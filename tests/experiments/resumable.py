"""A comparison in processes of its own that can be killed, and what is left of it: for the tests of resuming."""

import collections
import json
import os
import signal
import subprocess
import sys
import time

NORMS, LRS, SEEDS = ("none", "batch", "layer"), (0.1, 0.2), 4
GRID = len(NORMS) * len(LRS) * SEEDS
LISTED = ["--norms", ",".join(NORMS), "--lrs", ",".join(map(str, LRS)), "--seeds", str(SEEDS)]

TRAIN = """
import os, time
here = os.path.dirname(os.path.abspath(__file__))

def train(trial):
    name = f"{trial.norm} {trial.lr} {trial.seed}"
    def told(what):  # one write, so that lines of several processes do not mix
        with open(os.path.join(here, what), "a") as file:
            file.write(name + "\\n")
    told("begun")
    if os.path.exists(os.path.join(here, "die")) and trial.seed == 2:
        os.kill(os.getpid(), 9)
    time.sleep(0.15)
    value = {"none": 0.5, "batch": 0.8, "layer": 0.7}[str(trial.norm)] - trial.lr / 10 + trial.seed / 100
    for step in (1, 2, 3):
        trial.report(step, accuracy=value if step == 3 else value / 2)
    told("ended")
"""


def run(folder, arguments, *, main="from normkit.cli import main; sys.exit(main())", **options):
    """The command line, in a session of its own, so that all its processes can be counted."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests in the background of a shell: the command inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-c", f"import sys; {main}", *arguments]
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes, **options)


def wait_for(condition, running, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        for process in [running] if isinstance(running, subprocess.Popen) else running:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def times(folder, what):
    return collections.Counter((folder / what).read_text().splitlines())


def results(folder):
    """What the report says, without times and circumstances."""
    plain = json.loads((folder / "normkit-report" / "results.json").read_text())
    found = [(t["config"]["norm"], t["config"]["lr"], t["config"]["seed"], t["final"]) for t in plain["trials"]]
    means = [(v["norm"], v["best_lr"], v["mean_final"]) for v in plain["summary"][0]["variants"]]
    return found, means


def gone(running, seconds=10):
    """Whether no process of the group is left."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
