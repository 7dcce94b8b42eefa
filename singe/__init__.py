"""Channel pruning by integrated gradient variation: score, prune, fine-tune."""

from importlib.metadata import PackageNotFoundError, version

from singe import adapters, quadrature
from singe.compress import CompressReport, compress
from singe.errors import (
    BudgetError,
    DataError,
    KernelError,
    ModelError,
    NonFiniteError,
    OptionError,
    ScoresError,
    SingeError,
)
from singe.gates import register_layer
from singe.plan import Plan, plan
from singe.pruning import PruneReport, prune
from singe.quadrature import Quadrature
from singe.scores import Scores
from singe.scoring import score

try:
    __version__ = version("singe")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BudgetError",
    "CompressReport",
    "DataError",
    "KernelError",
    "ModelError",
    "NonFiniteError",
    "OptionError",
    "Plan",
    "PruneReport",
    "Quadrature",
    "Scores",
    "ScoresError",
    "SingeError",
    "adapters",
    "compress",
    "plan",
    "prune",
    "quadrature",
    "register_layer",
    "score",
]
