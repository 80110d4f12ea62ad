"""`convert`, which `qlora_native.convert.merge` has."""

from ..convert.merge import TARGETS, Report, convert

__all__ = ["TARGETS", "Report", "convert"]
