"""Print the requirements of extras of pyproject.toml, one a line: python .ci/requirements.py EXTRA [EXTRA ...].

pip can install extras only together with the package; this is for what must be there before the package is built.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
