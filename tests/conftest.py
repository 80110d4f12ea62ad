"""Fixtures that several test modules use."""

import shutil
import sys

import oracle
import pytest


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one of N cases")


@pytest.hookimpl(trylast=True)  # of those that -k and -m select
def pytest_collection_modifyitems(config, items):
    items[:] = items[:: config.getoption("every")]


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    """The program of examples/cpp_trainer, built against the installed package."""
    from test_package import ROOT, cmake, run

    package = run(sys.executable, "-m", "qlora_native", "--cmake-dir").strip()
    source, build = ROOT / "examples/cpp_trainer", tmp_path_factory.mktemp("trainer")
    cmake("-S", source, "-B", build, "-G", "Ninja", f"-Dqlora_native_DIR={package}", "-DCMAKE_CXX_FLAGS=-Werror")
    cmake("--build", build)
    if shutil.which("nvcc"):  # where there is a toolkit, the part for a GPU compiles and links too
        assert list(build.rglob("cuda.cpp.o"))
    return build / "trainer"


@pytest.fixture(scope="module")
def one_thread():
    """For small models."""
    with oracle.one_thread():
        yield
