"""Scores as data: a mapping from group name to one number per unit, with where they come from."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from singe.errors import NonFiniteError, ScoresError, expect
from singe.files import header_of, replacing
from singe.graph import Group, unwrapped


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and shapes of all parameters and buffers, not their values."""
    state = unwrapped(model).state_dict()  # with whatever ``get_extra_state`` gives
    shapes = sorted((name, list(getattr(t, "shape", ()))) for name, t in state.items())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


class ScoreTable(Mapping[str, Tensor]):
    """Name -> float32 CPU tensor, higher = keep; what :class:`Scores` and weight scores share.

    Attributes:
        meta: criterion, path, quadrature, objective, samples, versions, fingerprint, seconds.
        stderr: standard errors in the same mapping, or None where they were not computed.
    """

    FORMAT = ""  # of the file
    ENTRY = ""  # what a name stands for, in messages

    def __init__(
        self,
        values: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        stderr: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._values = {name: self._as_numbers(name, t) for name, t in values.items()}
        self.require_finite()
        self.meta = dict(meta)
        self.stderr = None if stderr is None else {k: t.float() for k, t in stderr.items()}

    def _as_numbers(self, name: str, values: Any) -> Tensor:
        try:
            found = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
            return found.detach().to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScoresError(
                f"the scores of {self.ENTRY} {name!r} are no tensor of numbers: {error}"
            ) from error

    def require_finite(self) -> None:
        """Raise where a score is none; the tensors may have been written to since they were made.

        Raises:
            NonFiniteError: NaN or infinity.
        """
        for name, tensor in self._values.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"the scores of {self.ENTRY} {name!r} hold NaN or infinite values; are the "
                    "gradients of this network finite? A half-precision model may overflow: score in "
                    "float32. In scores of your own, protect a unit by min_keep= or ignore=, not by infinity"
                )

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._values[name]
        except KeyError:
            raise KeyError(self._unknown(name)) from None

    def __eq__(self, other: object) -> bool:
        """Whether other holds the same names with the same values, to the bit."""
        if not isinstance(other, ScoreTable):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(t, other[n]) for n, t in self.items()
        )

    def _unknown(self, name: object) -> str:
        """Why there is nothing under a name, and what there is instead."""
        near = difflib.get_close_matches(str(name), self._values, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        return f"there are no scores of {self.ENTRY} {name!r}{hint}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def check(self, model: nn.Module) -> None:
        """Raise where these scores were computed on a model of other names or shapes.

        Of scores made by hand nothing is known.

        Raises:
            ScoresError: another architecture, or the same one pruned since.
        """
        expected, got = self.meta.get("fingerprint"), fingerprint(model)
        if expected is not None and expected != got:
            raise ScoresError(
                f"these scores belong to another model: they were computed on "
                f"{self.meta.get('model')} with fingerprint {str(expected)[:12]}, this "
                f"{type(model).__name__} has {got[:12]}. Was it pruned since? Score it again"
            )

    def _write(
        self,
        path: str | PathLike[str],
        header: Mapping[str, Any],
        parts: Mapping[str, Mapping[str, Tensor] | None],
    ) -> None:
        """A safetensors file of the values and ``parts`` (kind -> name -> tensor), the header as JSON."""
        tensors = {}
        for kind, named in {"score": self._values, "stderr": self.stderr, **parts}.items():
            for name, t in (named or {}).items():
                t = t.detach().cpu().contiguous()
                tensors[f"{kind}/{name}"] = t.float() if t.is_floating_point() else t
        text = json.dumps({"format": self.FORMAT, "meta": self.meta, **header})
        with replacing(path) as partial:
            save_file(tensors, partial, metadata={"singe": text})

    @classmethod
    def _read(
        cls, path: str | PathLike[str]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Header and parts (kind -> name -> tensor) of a file; call it inside of :func:`reading`."""
        kinds = ("score", "stderr", "completeness", "units")
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        with safe_open(fspath(path), framework="pt") as file:
            header = header_of(file)
            if header.get("format") != cls.FORMAT:
                raise ScoresError(
                    f"{fspath(path)} is no file of singe scores ({cls.FORMAT})"
                    + (f"; it holds {header.get('format')}" if header else "")
                )
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                kind, name = key.split("/", 1)
                parts[kind][name] = file.get_tensor(key)
        return header, parts


@contextmanager
def reading(path: str | PathLike[str]) -> Iterator[None]:
    """What can go wrong with a damaged file becomes a ScoresError with its name."""
    try:
        yield
    except ScoresError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ScoresError(f"cannot read scores from {fspath(path)}: {error}") from error


class Scores(ScoreTable):
    """Group name -> float32 CPU tensor [U], higher = keep.

    Attributes:
        groups: per group the layers whose output channels its units are.
        units: per group and layer int64 [C_out]: the unit of each output channel, -1 where it is none of
            this group's; see :meth:`units_of`.
        meta: criterion, path, quadrature, objective, samples, versions, fingerprint, seconds.
        stderr: standard errors in the same mapping, or None where they were not computed.
        completeness: criterion ``signed`` only: integral minus true loss change, [U] per group on the
            neuron path, [1] per group on the layer path, [1] under ``"network"``.
    """

    FORMAT = "singe-scores-1"
    ENTRY = "group"

    def __init__(
        self,
        values: Mapping[str, Tensor],
        groups: Mapping[str, tuple[str, ...]],
        meta: Mapping[str, Any],
        stderr: Mapping[str, Tensor] | None = None,
        completeness: Mapping[str, Tensor] | None = None,
        units: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(values, meta, stderr)
        for name, tensor in self._values.items():
            if tensor.dim() != 1:
                raise ScoresError(
                    f"the scores of {name!r} have shape {tuple(tensor.shape)}; give one number per unit, [U]"
                )
        self.groups = dict(groups)
        self.completeness = None if completeness is None else dict(completeness)
        self.units = {group: dict(layers) for group, layers in (units or {}).items()}

    def __repr__(self) -> str:
        units = sum(len(t) for t in self._values.values())
        what = self.meta.get("criterion", "?")
        return (
            f"Scores({what}, {len(self)} groups, {units} units, {self.meta.get('samples')} samples)"
        )

    def _unknown(self, name: object) -> str:
        for group, layers in self.groups.items():
            if name in layers:
                return f"{name!r} is coupled with {group!r}, and the scores of both are under that name"
        return super()._unknown(name)

    def units_of(self, group: str, layer: str, channels: int) -> Tensor:
        """int64 [channels]: the unit of ``group`` that each output channel of ``layer`` belongs to.

        -1 for channels of other groups. Where nothing is known of the layer (scores made by hand), unit u
        is channels u, u + U, ...; where they cannot be shared out so, none is known of a coupled layer.

        Raises:
            ScoresError: they cannot, and the layer is the one that the scores are named after.
        """
        known = self.units.get(group, {}).get(layer)
        if known is not None:
            return known
        count = len(self[group])
        if not count or channels % count:
            if layer != group:
                return torch.full((channels,), -1, device="cpu")
            raise ScoresError(
                f"there are {count} scores of {group!r}, which has {channels} channels; give one number per "
                "channel"
            )
        return torch.arange(channels, device="cpu") % count

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file; everything but the tensors goes into its metadata as JSON.

        An existing file is replaced at once or not at all.
        """
        maps = [(group, layer) for group, layers in self.units.items() for layer in layers]
        units = {str(i): self.units[group][layer].int() for i, (group, layer) in enumerate(maps)}
        header = {"groups": self.groups, "units": maps}
        self._write(path, header, {"completeness": self.completeness, "units": units})

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module | None = None) -> Scores:
        """Read what :meth:`save` wrote; with ``model``, check that they belong to it.

        Raises:
            ScoresError: not such a file, damaged, or the scores of another model.
        """
        with reading(path):
            header, parts = cls._read(path)
            groups = {name: tuple(names) for name, names in header["groups"].items()}
            values = {name: parts["score"][name] for name in groups if name in parts["score"]}
            meta = dict(header["meta"])
            units: dict[str, dict[str, Tensor]] = {}
            for index, (group, layer) in enumerate(header.get("units", ())):
                units.setdefault(group, {})[layer] = parts["units"][str(index)].long()
        stderr, completeness = parts["stderr"] or None, parts["completeness"] or None
        scores = cls(values, groups, meta, stderr, completeness, units)
        if model is not None:
            scores.check(model)
        return scores


def scores_for(scores: Mapping[str, Any], model: nn.Module) -> Scores:
    """Scores to rank the units of ``model`` by; those of a plain mapping are made some.

    Raises:
        OptionError: neither.
        ScoresError: none at all, of something else than units, or of another model.
        NonFiniteError: NaN or infinity.
    """
    expect("scores", scores, Mapping, "what singe.score returned, or {'conv1': [U] tensor}")
    require_units(scores)
    found = scores if isinstance(scores, Scores) else Scores(scores, {}, {"criterion": "given"})
    if not found:
        raise ScoresError("there are no scores; give those of one group at least")
    found.require_finite()
    found.check(model)
    layers = {name for name, _ in unwrapped(model).named_modules()}
    if foreign := [name for name in found if name not in layers]:
        raise ScoresError(
            f"there are scores of {foreign[0]!r}, which {type(model).__name__} does not have; names are "
            "those of model.named_modules()"
        )
    return found


def require_one_per_unit(scores: Mapping[str, Tensor], group: Group) -> None:
    """Raise where there are more or fewer scores of a group than it has units, or none under its name.

    Raises:
        ScoresError: so.
    """
    if group.name not in scores:
        raise ScoresError(
            f"the units of {', '.join(scores.keys() & set(group.layers))} go with those of "
            f"{group.name!r}: give their scores under that name"
        )
    if len(scores[group.name]) != group.n_units:
        raise ScoresError(
            f"there are {len(scores[group.name])} scores for the {group.n_units} units of {group.name}"
        )


def expect_scores(scores: object, argument: str = "scores") -> None:
    """Raise OptionError for what is no table of scores."""
    expect(argument, scores, ScoreTable, "what singe.score returned")


def require_units(scores: Mapping[str, Tensor]) -> None:
    """Raise where units are to be ranked and these are scores of something else.

    Raises:
        ScoresError: they are a table of other entries than groups of units.
    """
    if isinstance(scores, ScoreTable) and not isinstance(scores, Scores):
        raise ScoresError(
            f"these are {type(scores).__name__}, and whole units are needed here; use "
            "singe.score(..., granularity='unit')"
        )
