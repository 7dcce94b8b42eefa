"""Channel pruning by integrated gradient variation: score, prune, fine-tune."""

from singe import adapters, quadrature
from singe.attention import register_attention
from singe.compress import CompressReport, compress
from singe.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    ExportError,
    KernelError,
    ModelError,
    NonFiniteError,
    OptionError,
    ScoresError,
    SingeError,
)
from singe.export import load_pruned, save_pruned
from singe.finetune import Stage
from singe.gates import register_layer
from singe.latency import Timing
from singe.plan import Plan, plan
from singe.pruning import PruneReport, prune
from singe.quadrature import Quadrature
from singe.scores import Scores
from singe.scoring import score
from singe.versions import VERSION
from singe.weight_scores import WeightScores

__version__ = VERSION

__all__ = [
    "BudgetError",
    "CheckpointError",
    "CompressReport",
    "DataError",
    "ExportError",
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
    "Stage",
    "Timing",
    "WeightScores",
    "adapters",
    "compress",
    "load_pruned",
    "plan",
    "prune",
    "quadrature",
    "register_attention",
    "register_layer",
    "save_pruned",
    "score",
]
