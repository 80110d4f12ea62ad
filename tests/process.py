"""Python in a process of its own, for what an environment variable decides when the library is loaded."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run(*arguments, **environment):
    """The ended process of `python arguments...` in the folder of the tests."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=TESTS)


def succeed(*arguments, **environment):
    """The same, of one that must end without an error."""
    done = run(*arguments, **environment)
    assert done.returncode == 0, f"{environment}\n{done.stdout[-20000:]}{done.stderr[-5000:]}"
    return done


def pytest_of(*arguments, **environment):
    """What pytest says of tests that must pass."""
    return succeed("-m", "pytest", "--tb=short", "-p", "no:cacheprovider", *arguments, **environment)
