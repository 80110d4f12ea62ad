"""Fixtures that several test modules use."""

import importlib.util
import os
import sys
from pathlib import Path

import oracle
import pytest
import torch

# Tests are of all kernels, whatever a check on this machine has switched off; test_check.py is of that.
os.environ["QLN_CHECKS"] = "0"

# What CMake's find_package(nlohmann_json) would find in a system; the package of PyPI has the header alone.
JSON_PACKAGE = """
add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED)
target_include_directories(nlohmann_json::nlohmann_json INTERFACE "{include}")
"""


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one of N cases")


@pytest.hookimpl(trylast=True)  # of those that -k and -m select
def pytest_collection_modifyitems(config, items):
    items[:] = items[:: config.getoption("every")]


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    """The program of examples/cpp_trainer, built against the installed package."""
    from test_package import ROOT, cmake, run

    json = importlib.util.find_spec("nlohmann_json")
    if json is None:
        pytest.skip("the header of nlohmann_json is not installed: pip install nlohmann-json")
    build = tmp_path_factory.mktemp("trainer")
    include = Path(json.submodule_search_locations[0]) / "include"
    (build / "nlohmann_jsonConfig.cmake").write_text(JSON_PACKAGE.format(include=include.as_posix()))
    package = run(sys.executable, "-m", "qlora_native", "--cmake-dir").strip()
    folders = (f"-Dqlora_native_DIR={package}", f"-Dnlohmann_json_DIR={build}")
    cmake("-S", ROOT / "examples/cpp_trainer", "-B", build, "-G", "Ninja", *folders, "-DCMAKE_CXX_FLAGS=-Werror")
    cmake("--build", build)
    return build / "trainer"


@pytest.fixture(autouse=True)
def threads():
    """A test may change their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """For small models."""
    with oracle.one_thread():
        yield


@pytest.fixture
def eager():
    """For bitsandbytes' reference code, which is under torch.compile and would call a C++ compiler for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield
