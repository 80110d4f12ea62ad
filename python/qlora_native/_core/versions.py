"""Check that another library is installed in a version that an integration supports, or say so in one sentence."""

from __future__ import annotations

import importlib.metadata

# The oldest versions that are supported. The extras of pyproject.toml have the same bounds; a test compares them.
MIN_VERSIONS = {"transformers": "5.23", "peft": "0.21", "bitsandbytes": "0.50", "gguf": "0.17"}


def require(package: str) -> None:
    """Raise an ImportError that says what to install, unless `package` is installed in a version that is new enough."""
    wanted = f'pip install "{package}>={MIN_VERSIONS[package]}"'
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"qlora_native: this needs {package}, which is not installed: {wanted}") from None
    if _numbers(version) < _numbers(MIN_VERSIONS[package]):
        raise ImportError(
            f"qlora_native: this needs {package} {MIN_VERSIONS[package]} or later, got {version}: {wanted}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (5, 23) of "5.23.0rc1"."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
