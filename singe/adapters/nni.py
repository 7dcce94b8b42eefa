"""NNI 3: scores as the metrics of a pruner.

    pruner = nni.pruner(model, config_list, scores)
    _, masks = pruner.compress()
    pruner.unwrap_model()

``config_list`` is NNI's own: operator types or names, ``sparse_ratio`` or ``sparse_threshold``, and
dependency groups, whose metrics NNI averages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from singe.adapters import required
from singe.adapters.channel_scores import channel_scores
from singe.errors import ModelError
from singe.scores import Scores


def pruner(model: nn.Module, config_list: list[dict[str, Any]], scores: Scores) -> Any:
    """An ``nni.compression.base.compressor.Pruner`` that masks the lowest scores first.

    Args:
        model: the model that was scored; NNI wraps its layers in place.
        config_list: only layers with scores may be in it.
        scores: of this very model.

    Raises:
        OptionError: NNI is not installed.
        ScoresError: scores of another model.
        ModelError: a layer of the configuration has no scores.
    """
    base = required("nni.compression.base.compressor", "nni").Pruner
    generate_sparsity = required("nni.compression.pruning.tools", "nni").generate_sparsity
    by_layer = channel_scores(scores, model)

    class ScorePruner(base):  # type: ignore[misc,valid-type]
        def _collect_data(self) -> dict[str, dict[str, Tensor]]:
            return {}

        def _calculate_metrics(self, data: Any) -> dict[str, dict[str, Tensor]]:
            metrics: dict[str, dict[str, Tensor]] = {}
            for layer, targets in self._target_spaces.items():
                if layer not in by_layer:
                    raise ModelError(
                        f"layer {layer!r} of config_list has no scores; scored are "
                        f"{', '.join(by_layer)}"
                    )
                for name, space in targets.items():
                    if name in ("weight", "bias") and space.target is not None:
                        metrics.setdefault(layer, {})[name] = _shaped(by_layer[layer], space.target)
            return metrics

        def _generate_sparsity(self, metrics: Any) -> Any:
            return generate_sparsity(metrics, self._target_spaces)

        def compress(self, max_steps: None = None, max_epochs: None = None) -> Any:
            return super().compress(max_steps, max_epochs)

        def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
            self.update_masks(self.generate_masks())

        def _fuse_preprocess(self, evaluator: Any) -> None:
            pass

        def _fuse_postprocess(self, evaluator: Any) -> None:
            pass

    return ScorePruner(model, config_list)


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    """[C, 1, 1, ...]: NNI's scaling keeps the dimensions it reduces."""
    return values.to(like.device, torch.float32).view(-1, *[1] * (like.dim() - 1))
