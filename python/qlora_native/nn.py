"""`Linear4bit`, an `nn.Linear` whose weight stays in 4 bits, and `quantize_model`, which puts it into a model.

`Embedding4bit` and `Experts4bit` are the same for embeddings and for the experts of a mixture. `MappedWeights`
reads weights that stay in their files before their layers need them. `PagedWeights` copies weights that stay in the
host's memory to a GPU before their layers need them.
"""

from ._layers.embedding import Embedding4bit
from ._layers.experts import Experts4bit
from ._layers.linear import Linear4bit, Linear8bit
from ._layers.mapped import MappedWeights
from ._layers.paged import PagedWeights
from ._layers.quantize_model import quantize_model
from ._layers.sizes import SizeReport, size_report

__all__ = [
    "Embedding4bit",
    "Experts4bit",
    "Linear4bit",
    "Linear8bit",
    "MappedWeights",
    "PagedWeights",
    "SizeReport",
    "quantize_model",
    "size_report",
]
