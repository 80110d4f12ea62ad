"""Print the requirements of extras of pyproject.toml, one a line: python .ci/requirements.py EXTRA [EXTRA ...].

pip can install extras only together with the package; this is for what must be there before the package is built.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
own = re.compile(rf"{project['name']}\[(\w+)\]")


def requirements(extra):
    """Those of an extra, and of the extras that it names."""
    for requirement in project["optional-dependencies"][extra]:
        named = own.fullmatch(requirement)
        yield from requirements(named[1]) if named else [requirement]


for extra in sys.argv[1:]:
    print(*requirements(extra), sep="\n")
