"""Plant mistakes in the kernels, one at a time, and check that a test notices.

Each mutant of mutants/*.toml is a small change of one file: a barrier, a wait or a mask left out, a bound or an index
off by one. A table there is named by the suite that should notice its mutants and by their file; an entry is a mistake,
the text to find, which occurs once in the file, and its replacement. This program changes a copy of the tree, never the
tree itself, and builds and runs the suite. The exit status is 1 if a mutant survives: then a test is missing.

    python tools/mutants.py                  all of them (make mutants)
    python tools/mutants.py --sample         a few that are built and tested in seconds, as `make test-all` does
    python tools/mutants.py --only low_rank  those whose file or description contains this text
    python tools/mutants.py --new --output   those that the report lacks, after an interrupted run
    python tools/mutants.py --check          build nothing; check that each mutant still fits the tree

--output writes the results to bench/results/mutants.md. Mutants that were not tried keep their old results.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "bench/results/mutants.md"
# A test hangs if it takes this many times as long as over the unchanged tree, and at least this many seconds.
TIMES_LONGER, LEAST_TIMEOUT = 10, 30
# Build only what the tests need. One instruction set of x86 is enough, because all compile the same algorithms, and -O3
# takes minutes. Warnings are no errors, because a mutant may leave a variable unused.
CONFIGURE = (
    "-DQLN_BUILD_TESTS=ON",
    "-DQLN_BUILD_PYTHON=OFF",
    "-DQLN_CUDA=OFF",
    "-DQLN_AVX512=OFF",
    "-DQLN_OPTIMIZE=-O1",
    "-DQLN_WERROR=OFF",
)


@dataclass(frozen=True)
class Suite:
    """A C++ test: its CMake target, its environment variables, and whether it is built from a file or two."""

    target: str
    environment: Mapping[str, str] = field(default_factory=dict)
    is_quick: bool = False


EMULATED = {"QLN_BACKEND": "cuda_emulated"}
SUITES = {
    "cuda_product_config": Suite("qln_test_cuda_product_config", is_quick=True),
    "gemm_layout": Suite("qln_test_gemm_layout", is_quick=True),
    "code_table": Suite("qln_test_code_table", is_quick=True),
    "nearest_codes": Suite("qln_test_nearest_codes", is_quick=True),
    "concurrent": Suite("qln_test_concurrent", EMULATED),
    "core_emulated": Suite("qln_test", EMULATED),
    "conformance_emulated": Suite("qln_test_conformance", EMULATED),
    "cuda_panels": Suite("qln_test_cuda_panels", EMULATED),
    "paged": Suite("qln_test_paged", EMULATED),
    "paged_weights": Suite("qln_test_paged_weights", EMULATED),
    "row_groups": Suite("qln_test_row_groups", EMULATED),
    "wgmma": Suite("qln_test_wgmma", EMULATED),
    # These use the best instruction set of the build: AVX2 or Advanced SIMD.
    "core": Suite("qln_test"),
    "conformance": Suite("qln_test_conformance"),
    "conformance_tiles": Suite("qln_test_conformance", {"QLN_FORCE_ISA": "amx_emulated"}),
    "attention": Suite("qln_test_attention"),
    "calibrate": Suite("qln_test_calibrate"),
}


@dataclass(frozen=True)
class Mutant:
    """A mistake, and the suite that should notice it."""

    suite: str
    file: str
    mistake: str
    find: str
    replace: str

    def __str__(self) -> str:
        """The name of the mutant in reports."""
        return f"{self.file}: {self.mistake}"


def read_mutants() -> list[Mutant]:
    """The mutants of mutants/*.toml."""
    return [
        Mutant(suite, file, mistake, *change)
        for path in sorted(Path(__file__).with_suffix("").glob("*.toml"))
        for suite, files in tomllib.loads(path.read_text()).items()
        for file, mistakes in files.items()
        for mistake, change in mistakes.items()
    ]


def sample_of(mutants: list[Mutant]) -> list[Mutant]:
    """The first mutant of each quick suite."""
    first = {mutant.suite: mutant for mutant in reversed(mutants)}
    return [mutant for suite, mutant in first.items() if SUITES[suite].is_quick]


class BuildError(Exception):
    """A tree that does not compile."""


@dataclass(frozen=True)
class Outcome:
    """The result of a test. `noticed_by` is the function that failed, or how the process ended; None if it passed."""

    noticed_by: str | None
    seconds: float


class Tree:
    """A copy of the tree and its build, both below `folder`, where they stay for the next run."""

    def __init__(self, folder: Path, jobs: int):
        """Copy the files that differ, so that only these are built again."""
        self.source, self.build, self.jobs = folder / "source", folder / "build", jobs
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "CMakeLists.txt", "cmake", "cpp"]
            + ["cuda", "tests/cpp"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        names = {name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()}
        self.source.mkdir(parents=True, exist_ok=True)
        for old in [path for path in self.source.rglob("*") if path.is_file()]:
            if str(old.relative_to(self.source)) not in names:
                old.unlink()
        for name in names:
            self._put(name, (ROOT / name).read_bytes())
        self.environment = {**os.environ, "CCACHE_BASEDIR": str(folder), "CCACHE_NOHASHDIR": "1"}
        self.environment["QLN_STOP_AT_FAILURE"] = "1"
        if not (self.build / "build.ninja").is_file():
            self._call("cmake", "-S", str(self.source), "-B", str(self.build), "-G", "Ninja", *CONFIGURE)

    def plant(self, mutant: Mutant) -> None:
        """Make the mistake in the copy."""
        text = (ROOT / mutant.file).read_text()
        self._put(mutant.file, text.replace(mutant.find, mutant.replace).encode())

    def restore(self, mutant: Mutant) -> None:
        """Undo the mistake."""
        self._put(mutant.file, (ROOT / mutant.file).read_bytes())

    def make(self, targets: list[str]) -> None:
        """Build the targets."""
        self._call("cmake", "--build", str(self.build), f"-j{self.jobs}", "--target", *targets)

    def run(self, name: str, timeout: float | None = None) -> Outcome:
        """Run a suite for at most `timeout` seconds."""
        suite, begin = SUITES[name], time.monotonic()
        try:
            done = subprocess.run(
                [str(self.build / suite.target)],
                env={**self.environment, **suite.environment},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return Outcome("a hang", time.monotonic() - begin)
        noticed_by = None if done.returncode == 0 else self._first_failure(done)
        return Outcome(noticed_by, time.monotonic() - begin)

    def _first_failure(self, done: subprocess.CompletedProcess[str]) -> str:
        if failed := re.search(r"^(\S+\.(?:cpp|h)):(\d+): ", done.stdout, re.MULTILINE):
            return _function_at(self.build / failed[1], int(failed[2]))
        if emulator := re.search(r"^cuda_emulated: (?:thread .*?: )?([^:\n]*)", done.stderr, re.MULTILINE):
            return f"the emulator: {emulator[1]}"
        if done.returncode < 0:
            return f"a crash (signal {-done.returncode})"
        return done.stdout.rstrip().rpartition("\n")[2] or f"exit status {done.returncode}"  # or how many codes

    def _put(self, name: str, content: bytes) -> None:
        path = self.source / name
        if path.is_file() and path.read_bytes() == content:  # so that nothing is built again
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def _call(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError((done.stdout + done.stderr)[-4000:])


def _function_at(path: Path, line: int) -> str:
    """The name of the function around a line of a C++ test."""
    for text in reversed(path.read_text().splitlines()[:line]):
        if begin := re.match(r"TEST\((\w+)\)|(?:  )?(?:template <.*> )?\w[\w:<>,&* ]* \**(\w+)\(.*\{( .*)?$", text):
            return begin[1] or begin[2]
    return f"{path.name}:{line}"


def mistakes_of_the_list(mutants: list[Mutant]) -> list[str]:
    """The mutants that do not fit the tree: each must change exactly one place, and name a suite that exists."""
    mistakes, seen = [], set()
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text().count(mutant.find) if (ROOT / mutant.file).is_file() else 0
        if count != 1:
            mistakes.append(f"{mutant}: its text occurs {count} times in {mutant.file}, expected once:\n{mutant.find}")
        if mutant.find == mutant.replace:
            mistakes.append(f"{mutant}: changes nothing")
        if str(mutant) in seen:
            mistakes.append(f"{mutant}: is listed twice")
        if mutant.suite not in SUITES:
            mistakes.append(f"{mutant}: no suite is called {mutant.suite}")
        seen.add(str(mutant))
    return mistakes


def try_mutants(mutants: list[Mutant], tree: Tree) -> Iterator[tuple[Mutant, Outcome]]:
    """Yield each mutant with the outcome of its suite."""
    names = sorted({mutant.suite for mutant in mutants})
    tree.make(sorted({SUITES[name].target for name in names}))
    timeouts = {}
    for name in names:
        outcome = tree.run(name)
        if outcome.noticed_by is not None:
            sys.exit(f"{name} fails over the tree as it is: {outcome.noticed_by}")
        timeouts[name] = max(LEAST_TIMEOUT, TIMES_LONGER * outcome.seconds)
        print(f"without a mutant: {name} passes in {outcome.seconds:.1f} s", flush=True)
    for mutant in mutants:
        tree.plant(mutant)
        begin = time.monotonic()
        try:
            tree.make([SUITES[mutant.suite].target])
            outcome = tree.run(mutant.suite, timeouts[mutant.suite])
        except BuildError as error:
            sys.exit(f"{mutant}: does not compile\n{error}")
        finally:
            tree.restore(mutant)
        verdict = f"noticed by {mutant.suite}: {outcome.noticed_by}" if outcome.noticed_by else "SURVIVES"
        print(f"{time.monotonic() - begin:6.1f} s  {mutant}: {verdict}", flush=True)
        yield mutant, outcome


def last_report() -> dict[str, str]:
    """{mutant: its row of the report}."""
    rows = REPORT.read_text().splitlines() if REPORT.is_file() else []
    return {": ".join(row.removeprefix("| ").split(" | ")[:2]): row for row in rows if row.startswith("| c")}


def write_report(mutants: list[Mutant], results: list[tuple[Mutant, Outcome]]) -> None:
    """Write the report; mutants that were not tried keep their rows."""
    found = last_report()
    for mutant, outcome in results:
        verdict = f"`{outcome.noticed_by}`" if outcome.noticed_by else "nothing"
        found[str(mutant)] = f"| {mutant.file} | {mutant.mistake} | {mutant.suite} | {verdict} |"
    rows = [found[str(mutant)] for mutant in mutants if str(mutant) in found]
    noticed = sum(not row.endswith(" nothing |") for row in rows)
    lines = [
        "# Mutants of the kernels, and what notices them",
        "",
        f"{len(rows)} mistakes, planted one at a time by `make mutants`: a test notices {noticed} of them.",
        "",
        "| file | mistake | suite | noticed by |",
        "|---|---|---|---|",
        *rows,
    ]
    REPORT.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="only the few that are tested in seconds")
    parser.add_argument("--only", default="", help="only those whose file or description has this text")
    parser.add_argument("--new", action="store_true", help="only those that the report does not have")
    parser.add_argument("--check", action="store_true", help="only whether each changes one place of the tree")
    parser.add_argument("--output", action="store_true", help="write bench/results/mutants.md")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/mutants", help="for the copy and its build")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of the compiler at once")
    arguments = parser.parse_args()
    everything = read_mutants()
    if mistakes := mistakes_of_the_list(everything):
        print("\n".join(mistakes), file=sys.stderr)
        return 2
    if arguments.check:
        return 0
    if shutil.which("ninja") is None or shutil.which("cmake") is None:
        sys.exit("cmake and ninja are needed; the environment of `make` has them")
    known = last_report() if arguments.new else {}
    chosen = sample_of(everything) if arguments.sample else everything
    chosen = [mutant for mutant in chosen if arguments.only in str(mutant) and str(mutant) not in known]
    results = []
    for result in try_mutants(chosen, Tree(arguments.folder.resolve(), arguments.jobs)):
        results.append(result)
        if arguments.output:
            write_report(everything, results)
    survivors = [mutant for mutant, outcome in results if outcome.noticed_by is None]
    print(f"\n{len(chosen)} mutants: {len(chosen) - len(survivors)} noticed, {len(survivors)} not")
    for mutant in survivors:
        print(f"  survives, so that a test is missing: {mutant}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
