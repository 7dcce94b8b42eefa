"""Fine-tuning in stages, one per round, whose state follows its parameters through removal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from singe.data import Batch, as_batch, device_of, outputs_on
from singe.errors import DataError, ModelError, NonFiniteError, OptionError
from singe.finetune import Training
from singe.graph import BATCH_NORMS, named_tensors, unwrapped
from singe.modes import in_mode
from singe.objectives import class_dim, logits_of
from singe.recalibration import lacks_variance
from singe.removal import take
from singe.seeding import Stream, seed_all

SMALLEST_SCALE = 1e-4  # float16 overflows even so: 65536 has been halved 30 times


class Tuner:
    """Trains one model through all stages of a run.

    Every stage has a new optimizer and schedule. What the last optimizer had gathered per parameter
    (momentum, Adam's moments) goes on in the new one, and the averaged weights go on as well: after a
    removal :meth:`follow` keeps of each tensor what removal kept of its parameter.

    Args:
        model: trained in place.
        training: how.
        stream: where the batches come from.
        seed: of the run.
        teacher: gives the logits to distil from; None without distillation.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        stream: Stream,
        seed: int,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.training, self.stream = model, training, stream
        self.teacher, self.seed = teacher, seed
        self.total = 0  # steps of all stages
        self.step = self.steps = 0  # of this stage
        self.tail: list[float] = []
        self.average: dict[str, Tensor] | None = None
        self._optimizer: Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        self._scaler = torch.amp.GradScaler(
            device_of(model).type, enabled=training.autocast == torch.float16
        )
        self._gathered: dict[str, dict[str, Any]] = {}  # parameter -> what its optimizer gathered
        self._former = {id(p): ref(p) for p in self._trainable().values()}  # until they are pruned

    # ------------------------------------------------------------------ one stage

    def check(self) -> None:
        """Raise ModelError where no parameter requires a gradient."""
        if not self._trainable():
            raise ModelError(
                "no parameter requires a gradient, so there is nothing to fine-tune; thaw what shall be "
                "trained (requires_grad_()), or give finetune_steps=0 and final_steps=0"
            )

    def start(self, steps: int) -> None:
        """Begin a stage: a new optimizer over the parameters as they are now."""
        self.step, self.steps, self.tail = 0, steps, []
        self._optimizer = self._scheduler = None
        if steps == 0:
            return
        self.check()
        named = self._trainable()
        self._optimizer = self._new_optimizer(list(named.values()))
        on_device = any(g.get("fused") or g.get("capturable") for g in self._optimizer.param_groups)
        for name, parameter in named.items():
            if name in self._gathered:
                entries = self._optimizer.state[parameter] = self._gathered[name]
                if on_device and isinstance(step := entries.get("step"), Tensor):
                    entries["step"] = step.to(parameter.device)  # as in torch's load_state_dict
        self._scheduler = self._new_scheduler(self._optimizer, steps)

    def _new_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        made: Any = self.training.optimizer(parameters)
        if not isinstance(made, Optimizer) or isinstance(made, LBFGS):
            raise OptionError(
                f"optimizer returned {type(made).__name__}; it must return a torch.optim.Optimizer whose "
                "step() needs no closure"
            )
        own, held = set(parameters), {p for g in made.param_groups for p in g["params"]}
        former = [p for p in held - own if id(p) in self._former and self._former[id(p)]() is p]
        if former or not held & own:  # a part of them, or a loss's own beside them, is fine
            raise OptionError(
                f"the optimizer holds {len(former) or len(held)} parameters that are not in the network (any "
                "more): pruning makes new ones, so make the optimizer of those that it is given, "
                "optimizer=lambda parameters: torch.optim.SGD(parameters, 0.01)"
            )
        self._former |= {id(p): ref(p) for p in parameters}
        return made

    def _new_scheduler(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        made: Any = self.training.scheduler(optimizer, steps)
        if not hasattr(made, "step") or isinstance(made, ReduceLROnPlateau):
            raise OptionError(
                f"scheduler returned {type(made).__name__}; it must return an LRScheduler that can be "
                "stepped after every training step, without a metric"
            )
        if getattr(made, "optimizer", optimizer) is not optimizer:
            raise OptionError(
                "the scheduler is of another optimizer; make it of the one that it is given, "
                "scheduler=lambda optimizer, steps: ..."
            )
        return made

    def run(self, after_step: Callable[[], None] = lambda: None) -> float | None:
        """The rest of the stage; the modules' modes are put back afterwards.

        Returns:
            Mean loss of the last tenth of the steps, or None without any step.

        Raises:
            NonFiniteError: the loss diverged.
        """
        if self._optimizer is None:
            return None
        try:
            with in_mode(self.model, training=True):
                while self.step < self.steps:
                    self._one_step()
                    after_step()
        finally:
            self._clear_gradients()
        self._gathered = self._by_name()
        return sum(self.tail) / len(self.tail)

    def _one_step(self) -> None:
        optimizer, scheduler = self._optimizer, self._scheduler
        assert optimizer is not None
        assert scheduler is not None
        batch = as_batch(self.stream.next(), self.step, device_of(self.model))
        seed_all(self.seed, "step", self.total)
        try:
            loss = self._loss(batch)
        except ValueError as error:
            if not lacks_variance(error):
                raise
            raise DataError(
                f"a batch of {batch.size} sample has no variance for a BatchNorm to train on; leave such a "
                "rest out, DataLoader(..., drop_last=True)"
            ) from error
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"fine-tuning diverged: the loss of step {self.step} is {loss.item()}; lower `lr`"
            )
        self._clear_gradients()
        self._scaler.scale(loss).backward()
        if self.training.clip_grad_norm is not None:
            self._scaler.unscale_(optimizer)
            parameters = [p for g in optimizer.param_groups for p in g["params"]]
            nn.utils.clip_grad_norm_(parameters, self.training.clip_grad_norm)
        if self._update(optimizer):
            scheduler.step()
        self._clear_gradients()  # a checkpoint may be taken now
        self.step += 1
        self.total += 1
        if self.step > self.steps - max(1, self.steps // 10):
            self.tail.append(float(loss.detach()))
        if self.training.ema is not None:
            self._follow_average(self.training.ema)

    def _clear_gradients(self) -> None:
        """Of the optimizer's and the model's parameters: either may have some that the other lacks."""
        assert self._optimizer is not None
        self._optimizer.zero_grad(set_to_none=True)
        for parameter in self.model.parameters():
            parameter.grad = None

    def _update(self, optimizer: Optimizer) -> bool:
        """Step, unless scaled float16 gradients overflowed: then the scale is halved instead."""
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        after = self._scaler.get_scale()
        if after < SMALLEST_SCALE:
            raise NonFiniteError(
                f"fine-tuning diverged: the gradients of step {self.step} overflow float16 at every "
                "scale; lower `lr`, or use autocast=torch.bfloat16"
            )
        return after >= before

    def _loss(self, batch: Batch) -> Tensor:
        training = self.training
        kind = device_of(self.model).type
        mixed = torch.autocast(kind, training.autocast) if training.autocast else nullcontext()
        with mixed:
            outputs = outputs_on(self.model, batch, "training")
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = logits_of(batch.call(self.teacher)).float()
        loss = torch.zeros((), device=device_of(self.model))
        if training.distill < 1.0:
            training.objective.check(outputs, batch)
            task = training.objective.total(outputs, batch) / batch.size
            loss = task if self.teacher is None else (1.0 - training.distill) * task
        if self.teacher is not None:
            # Hinton et al. (arXiv 1503.02531): T^2 keeps the gradients' size as T changes.
            t = training.temperature
            dim = class_dim(outputs, batch.labels)
            student = (logits_of(outputs).float() / t).log_softmax(dim)
            teacher = (wanted / t).log_softmax(dim)
            soft = F.kl_div(student, teacher, reduction="sum", log_target=True)
            loss = loss + training.distill * t * t * soft / (wanted.numel() / wanted.shape[dim])
        return loss

    # ------------------------------------------------------------------ averaged weights

    @torch.no_grad()
    def _follow_average(self, decay: float) -> None:
        state = {name: _wide(t.detach()) for name, t in self._floating().items()}
        if self.average is None:
            self.average = {name: t.clone() for name, t in state.items()}
            return
        # A short run would mostly remember its start (as in TensorFlow's moving average).
        decay = min(decay, (1 + self.total) / (10 + self.total))
        for name, tensor in state.items():
            mean = self.average[name] = _wide(self.average[name])
            mean.lerp_(tensor, 1.0 - decay)
            # No number lies between two infinities: a causal mask of -inf stays what it is.
            torch.where(mean.isnan(), tensor, mean, out=mean)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the averaged weights in here, if there are any."""
        if self.average is None:
            yield
            return
        own = {name: t.detach().clone() for name, t in self._floating().items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    def keep_average(self) -> None:
        """The averaged weights become the model's."""
        if self.average is not None:
            self._write(self.average)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._floating().items():
            tensor.copy_(values[name])

    def _floating(self) -> dict[str, Tensor]:
        return {name: t for name, t in named_tensors(self.model) if t.is_floating_point()}

    # ------------------------------------------------------------------ removal and checkpoints

    def follow(self, kept: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        """Cut what was gathered as removal cut the parameters.

        Args:
            kept: from :func:`singe.removal.kept_elements`, taken before the removal.
            shapes: of all parameters before the removal. What is gathered in another shape, and is
                more than a number (factored moments), is dropped where its parameter was cut.
        """
        for name, entries in self._gathered.items():
            for key, value in list(entries.items()):
                if not isinstance(value, Tensor) or value.numel() == 1 != shapes[name].numel():
                    continue
                if value.shape == shapes[name]:
                    entries[key] = take(value, kept[name])
                elif kept[name].shape != shapes[name]:
                    entries.clear()
                    break
        self._gathered = {name: e for name, e in self._gathered.items() if e}
        if self.average is not None:
            self.average = {name: take(t, kept[name]) for name, t in self.average.items()}

    def restart_statistics(self) -> None:
        """BatchNorms' statistics were set anew: their averages, of a larger network, start from there."""
        if self.average is None:
            return
        for path, norm in unwrapped(self.model).named_modules():
            if isinstance(norm, BATCH_NORMS):
                own = norm.named_buffers(path, recurse=False)
                self.average |= {name: _wide(t).clone() for name, t in own if name in self.average}

    @property
    def follows(self) -> bool:
        """Whether there is anything to cut."""
        return bool(self._gathered) or self.average is not None

    def state(self) -> dict[str, Any]:
        """Everything but the model and its average: plain containers of numbers and tensors."""
        running = self._optimizer is not None and self.step < self.steps
        return {
            "total": self.total,
            "step": self.step,
            "steps": self.steps,
            "tail": self.tail,
            "gathered": self._by_name() if running else self._gathered,
            "groups": self._settings() if running else None,
            "scheduler": self._scheduler.state_dict() if running and self._scheduler else None,
            "scaler": self._scaler.state_dict(),
            "stream": self.stream.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`; the model and the average have their values back by now."""
        device = device_of(self.model)
        for entries in state["gathered"].values():
            for key, value in entries.items():
                if isinstance(value, Tensor) and key != "step":
                    entries[key] = value.to(device)
        self._gathered = state["gathered"]
        if state["groups"] is not None:
            self.start(state["steps"])
            assert self._optimizer is not None
            assert self._scheduler is not None
            self._scheduler.load_state_dict(state["scheduler"])
            for group, saved in zip(self._optimizer.param_groups, state["groups"], strict=True):
                group.update(saved)
        self.total, self.step, self.steps = state["total"], state["step"], state["steps"]
        self.tail = list(state["tail"])
        self._scaler.load_state_dict(state["scaler"])
        self.stream.seek(state["stream"])

    def _settings(self) -> list[dict[str, Any]]:
        assert self._optimizer is not None
        groups = self._optimizer.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def _by_name(self) -> dict[str, dict[str, Any]]:
        assert self._optimizer is not None
        state = self._optimizer.state
        return {n: dict(state[p]) for n, p in self._trainable().items() if p in state}

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in unwrapped(self.model).named_parameters() if p.requires_grad}


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: in the 8 or 11 bits of a half type a thousandth of a step is lost."""
    return tensor.float() if tensor.element_size() < 4 else tensor
