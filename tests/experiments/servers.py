"""A PostgreSQL server of the test's own, on loopback, that can be stopped and started."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

REASON = "PostgreSQL or psycopg2 is not installed; NORMKIT_REQUIRE=postgresql makes this a failure"


def binaries():
    """The folder of initdb and postgres: on the path, or where Debian puts it."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


def missing():
    try:
        import psycopg2  # noqa: F401
    except ImportError:
        return True
    return binaries() is None


def require():
    """Skip by name, or fail where NORMKIT_REQUIRE asks for it."""
    if missing():
        assert "postgresql" not in os.environ.get("NORMKIT_REQUIRE", "").replace(",", " ").split(), REASON
        pytest.skip(REASON)


class Server:
    """A cluster in a folder of its own; nobody else can reach it, and nothing of it stays."""

    def __init__(self):
        # Its programs refuse to run as root, and the user they run as must reach the folder.
        self.user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        self.folder = Path(tempfile.mkdtemp(prefix="normkit-postgresql-"))
        if self.user:
            shutil.chown(self.folder, "postgres", "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = None
        self.databases = 0
        initdb = [binaries() / "initdb", "-D", self.folder / "data", "-A", "trust", "-U", "normkit", "--no-sync"]
        made = [*initdb, "--no-locale", "-E", "UTF8"]
        subprocess.run(made, check=True, capture_output=True, cwd=self.folder, **self.user)

    def start(self):
        own = ["-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        self.process = subprocess.Popen(
            [binaries() / "postgres", "-D", self.folder / "data", *own, "-c", "fsync=off"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            **self.user,
        )
        until = time.monotonic() + 30
        while True:
            try:
                return self.query("select 1", "postgres")
            except OSError:
                assert self.process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)

    def stop(self):
        """A fast shutdown, as `systemctl restart` does: connections are cut."""
        if self.process is not None:
            self.process.send_signal(2)
            self.process.wait(30)
            self.process = None

    def close(self):
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def database(self):
        """A new one; its name."""
        self.databases += 1
        name = f"trials{self.databases}"
        self.query(f"create database {name}", "postgres")
        return name

    def url(self, name):
        return f"postgresql://normkit@127.0.0.1:{self.port}/{name}"

    def query(self, statement, name):
        """The rows. Raises OSError where there is no connection."""
        import psycopg2

        try:
            connection = psycopg2.connect(host="127.0.0.1", port=self.port, user="normkit", dbname=name)
        except psycopg2.OperationalError as error:
            raise OSError(str(error)) from error
        with contextlib.closing(connection):
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
