"""`LateToEarly`: an early layer of the model is drawn, in early steps, towards the late states of a small teacher.

The method is LET (arXiv 2602.05393): ``loss + lambda(s) * L_proj``, where L_proj is minus the mean over tokens of the
cosine between the student's state at an early layer and the pretrained teacher's at a late one, and lambda falls
linearly from `weight` to zero at `stop_step`.

How a forward flows. A pre-hook on the model runs the teacher on the same inputs. A tap on the student's layer sees the
state, and then either keeps it until `LateToEarly.__call__` adds the term to the loss, or (after `attach`) sends it on
through an identity whose backward adds the term's gradient. Forwards without gradients (evaluation, shape inference)
and recomputation of checkpointed regions pass unseen. At `stop_step` hooks and teacher go, and the model is as before.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import MismatchError, UsageError
from holdfast.runtime.guidance_attach import inject
from holdfast.runtime.guidance_gradients import average_gradients
from holdfast.runtime.guidance_layers import Border, Tap, argument_of, find_layer, state_of, unwrap, width_of
from holdfast.runtime.guidance_matching import (
    LearnedMatch,
    LinearMatch,
    Match,
    Side,
    divergence,
    mean_value,
    negative_cosine,
    same_width,
)
from holdfast.runtime.guidance_metrics import Meter
from holdfast.runtime.guidance_schedule import Kind, Schedule
from holdfast.runtime.guidance_teacher import Inputs, Source, Teacher, device_of
from holdfast.runtime.guidance_vocabulary import Tokenizer, check_same_tokenizer

log = logging.getLogger(__name__)

_USUAL_MASK = "attention_mask"
Mask = str | Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]


@dataclass(frozen=True)
class _Forward:
    """One forward of the student whose layer has not run yet."""

    teacher: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Guided:
    """One forward whose term is still to be added to the loss."""

    student: Tensor
    version: int
    """In-place changes of `student` when it was seen."""
    teacher: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Attached:
    """What `LateToEarly.attach` was given."""

    step: Callable[[], int]
    scale: Callable[[], float | Tensor]
    num_tokens: float | Tensor | None


class LateToEarly:
    """Guides an early layer of a model by a late layer of a small pretrained one. Training thread only.

    Example::

        guide = holdfast.LateToEarly(model, teacher, layer="blocks.2", teacher_layer="norm", stop_step=2_000)
        with holdfast.Session(model=model, optimizer=optimizer, extra={"guide": guide}) as session:
            for step in session.steps(until=10_000):
                loss = guide(loss_of(model, batch), step)

    Wrap, shard and compile the model before or after; names of layers are those of the bare model. The teacher is in no
    snapshot: with ``extra={"guide": guide}`` its identity is, and resuming with another one is an error.

    Args:
        model: the student: any module, wrapped by DDP or FSDP2 or not; with pipeline parallelism the stage that owns
            the layer, on the ranks that have it.
        teacher: a module in eval mode; a function that makes one (then nobody else refers to it and its memory is free
            at `stop_step`); or a Hugging Face folder.
        stop_step: the first step without guidance.
        layer: the student's layer by name, "blocks.-1" counting from the end.
        teacher_layer: the teacher's; name its final norm or its last block, as you mean the state after or before it.
        weight: lambda at step 0.
        schedule: "linear", "constant", or a function of the step that gives the factor of `weight`.
        objective: "cosine" between states, or "logits": KL(teacher || student) of the models' outputs (SALT, RKD);
            `layer` and `teacher_layer` default to the outputs then.
        match: how widths become equal: "linear" interpolation, a "learned" projection (see `learned`), None where they
            are, or a function ``(student, teacher) -> (student, teacher)``; a module's parameters are learned.
        side: whose states are brought to the other's width; default: the teacher's for "linear", the student's for
            "learned".
        widths: (student, teacher), for "learned" where they cannot be read off the layers.
        temperature: of "logits".
        teacher_weights: a holdfast checkpoint or safetensors, loaded into the teacher.
        teacher_dtype: the teacher is cast to it, in place; None: as it is.
        teacher_device: where it runs, moved in place; None: as it is, with the model where we make it.
        teacher_inputs: makes the teacher's ``(args, kwargs)`` of the student's, where these are not the same tokens
            (a later pipeline stage, another signature).
        mask: tokens that count, ``[batch, tokens]``: the name of an argument of the model's forward, or a function of
            ``(args, kwargs)``, say ``lambda args, kwargs: kwargs["labels"] != -100``; None: all count. The default name
            is passed over where a model has no such argument or it has another shape.
        tokenizer: the student's: a mapping, an object with ``get_vocab()`` or a folder; compared with the teacher's.
        teacher_tokenizer: the teacher's; default: its Hugging Face folder.
        process_group: ranks over which gradients of learned projections are averaged; default: those of DDP or FSDP2.

    Raises:
        UsageError: an argument that cannot work.
        MismatchError, CorruptError: `teacher_weights` cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Source,
        *,
        stop_step: int,
        layer: str | None = None,
        teacher_layer: str | None = None,
        weight: float = 0.1,
        schedule: Kind = "linear",
        objective: Literal["cosine", "logits"] = "cosine",
        match: Literal["linear", "learned"] | Match | None = "linear",
        side: Side | None = None,
        widths: tuple[int, int] | None = None,
        temperature: float = 1.0,
        teacher_weights: str | os.PathLike[str] | None = None,
        teacher_dtype: torch.dtype | None = None,
        teacher_device: torch.device | str | None = None,
        teacher_inputs: Callable[[tuple[Any, ...], dict[str, Any]], Inputs] | None = None,
        mask: Mask | None = _USUAL_MASK,
        tokenizer: Tokenizer | None = None,
        teacher_tokenizer: Tokenizer | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._schedule = Schedule(weight=weight, stop_step=stop_step, kind=schedule)
        if objective not in ("cosine", "logits"):
            raise UsageError(f"objective={objective!r} is unknown: use 'cosine' or 'logits'")
        self._logits = objective == "logits"
        self._layer = _layer_name(layer, "layer", self._logits)
        root = unwrap(model)
        found = find_layer(root, self._layer, argument="layer")
        check_same_tokenizer(tokenizer, _tokenizer_of(teacher, teacher_tokenizer))
        self._teacher: Teacher | None = Teacher(
            teacher,
            weights=teacher_weights,
            layer=_layer_name(teacher_layer, "teacher_layer", self._logits),
            logits=self._logits,
            dtype=teacher_dtype,
            device=teacher_device,
            default_device=device_of(model),
        )
        _check_apart(model, self._teacher.module)
        self._identity = self._teacher.identity
        self._value = divergence(temperature) if self._logits else negative_cosine
        self._match = _match(match, side, widths, (found, self._teacher.layer), logits=self._logits)
        self.learned = nn.ModuleDict()
        """Learned projections, by names that no model uses: one more part of the model for the Session
        (``model=[model, guide.learned]``). Empty where nothing is learned."""
        if isinstance(self._match, nn.Module):
            self.learned["late_to_early"] = self._match.to(device_of(model))
            average_gradients(self._match, model, process_group)
        self._passed_by = False
        """Whether a backward came by the layer, after `attach`, and did not reach the learned parameters."""
        for parameter in self.learned.parameters():
            register: Callable[[Callable[[Tensor], None]], object] = parameter.register_post_accumulate_grad_hook
            register(self._arrived)
        self._teacher_inputs = teacher_inputs
        self._mask = _mask_reader(root, mask)
        self._settings = {
            "weight": float(weight),
            "stop_step": stop_step,
            "layer": self._layer,
            "teacher_layer": str(teacher_layer),
            "objective": objective,
            "match": match if isinstance(match, str) else type(match).__name__,
            "teacher_dtype": str(teacher_dtype),
        }
        self._meter = Meter()
        self._current: _Forward | None = None
        self._pending: list[_Guided] = []
        self._attached: _Attached | None = None
        self._tap = Tap(root, self._layer, self._seen, argument="layer")
        self._border = Border(root, self._before, self._after)
        if self._schedule.weight == 0:
            self.close()

    # --- what the loop calls

    def __call__(
        self, loss: Tensor, step: int, *, mask: Tensor | None = None, num_tokens: float | Tensor | None = None
    ) -> Tensor:
        """The loss of the forward just made, with the term of this step added. From `stop_step` on: `loss` itself.

        With gradient accumulation it is called once per forward, before the loss is divided or scaled.

        Args:
            loss: scalar.
            step: 0-based, the one that is being computed.
            mask: tokens that count, ``[batch, tokens]``; goes before the mask of the constructor.
            num_tokens: divides the sum over tokens, where the mean over this rank's own tokens is not what the loss
                takes (context parallelism, micro-batches of unequal length); a number or a scalar tensor.

        Raises:
            UsageError: there was no forward, or more than one, since the last call; `attach` was called; or guidance
                had ended at an earlier call.
        """
        step = operator.index(step)
        weight = self._schedule.at(step)
        if self._schedule.over(step):
            self.close()
            return loss
        guided = self._take(step)
        value = self._term(guided.student, guided.teacher, guided.mask if mask is None else mask, num_tokens)
        self._note(step, weight, value)
        return loss + (value * weight).to(device=loss.device, dtype=loss.dtype)

    def attach(
        self,
        *,
        step: int | Callable[[], int],
        scale: float | Tensor | Callable[[], float | Tensor] = 1.0,
        num_tokens: float | Tensor | None = None,
    ) -> None:
        """Guide without the loss: from now on each forward carries the term's gradient by itself.

        For loops whose loss is out of reach (pipeline schedules, trainers). Call it before the forwards of each step,
        or once with functions. Gradients then equal those of ``guide(loss, step)``, whatever the loss is.

        Args:
            step: the step that the next forwards belong to.
            scale: what the loop multiplies its loss by before backward: 1 / n for n accumulated micro-batches (not for
                a pipeline schedule, which scales gradients itself), GradScaler's scale, or their product.
            num_tokens: as in `__call__`.

        Raises:
            UsageError: guidance had ended at an earlier step.
        """
        if not callable(step):
            step = operator.index(step)
            self._check_not_ended(step)
        step_of = step if callable(step) else _constant(step)
        scale_of = scale if callable(scale) else _constant(scale)
        self._attached = _Attached(step_of, scale_of, num_tokens)
        self._pending.clear()
        if not callable(step) and self._schedule.over(step):
            self.close()

    def clear(self) -> None:
        """Forget forwards whose loss is thrown away (a skipped batch)."""
        self._current = None
        self._pending.clear()

    def close(self) -> None:
        """Drop the teacher and all hooks: the model is as it was. Called by itself at `stop_step`; harmless twice."""
        if self._teacher is not None:
            self._teacher.drop()
            self._teacher = None
        self._tap.remove()
        self._border.remove()
        self._meter.stop()
        self.clear()

    @property
    def active(self) -> bool:
        """Whether the teacher is still there."""
        return self._teacher is not None

    def weight_at(self, step: int) -> float:
        """lambda at a step."""
        return self._schedule.at(step)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is learned besides the model, for the optimizer: with FSDP2, in a parameter group of its own."""
        return self.learned.parameters()

    def metrics(self) -> dict[str, float]:
        """The newest forward's "cosine" (or "divergence") on this rank, "lambda", and "teacher_share" of the last step.

        Waits for the device. The first is nan before the first forward and after `stop_step`.
        """
        value = float("nan") if self._meter.value is None else self._meter.value.item()
        name, sign = ("divergence", 1.0) if self._logits else ("cosine", -1.0)
        return {name: sign * value, "lambda": self._meter.weight, "teacher_share": self._meter.share()}

    # --- what a snapshot holds

    def state_dict(self) -> dict[str, Any]:
        """The teacher's identity and the settings: no weights."""
        return {"teacher": self._identity, "settings": dict(self._settings)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that training goes on with the teacher and the settings it began with.

        Raises:
            MismatchError: the teacher is another one.
        """
        if state_dict["teacher"] != self._identity:
            raise MismatchError(
                f"this run was guided by the teacher {state_dict['teacher'][:12]}, the one given now is "
                f"{self._identity[:12]}: give the same teacher, or leave the guide out of `extra` to change it"
            )
        saved = state_dict["settings"]
        changed = [key for key, value in self._settings.items() if saved.get(key) != value]
        for key in changed:
            log.warning("guidance goes on with %s=%r, it was %r", key, self._settings[key], saved.get(key))

    # --- hooks

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before each forward of the student: runs the teacher."""
        if _in_backward():
            return
        self._current = None  # of a forward that ended in an error
        if not torch.is_grad_enabled():
            return
        if self._attached is not None and self._schedule.over(self._attached.step()):
            self.close()
        if self._teacher is None:
            return
        self._tap.refresh()
        inputs = self._teacher_inputs(args, kwargs) if self._teacher_inputs else (args, kwargs)
        with self._meter.teacher(self._teacher.device):
            state = self._teacher.run(*inputs)
        self._current = _Forward(state, self._mask(args, kwargs, state))

    def _after(self) -> None:
        """Runs behind each forward: with `attach` nothing else would tell that the layer was not guided."""
        if self._current is None or self._attached is None:
            return
        self._current = None
        raise UsageError(
            f"layer {self._layer!r} did not run in this forward, so nothing is guided: name one that always runs "
            "(a model that was compiled and run before the guide was made needs torch.compiler.reset() after that)"
        )

    def _seen(self, output: Any) -> Any:
        """Runs behind each call of the layer: the first one in a forward is guided."""
        current, self._current = self._current, None
        if current is None:  # a forward without gradients, a further call, or recomputation
            return output
        state, rebuild = state_of(output, layer=self._layer, logits=self._logits)
        if not state.requires_grad:
            raise UsageError(
                f"the output of layer {self._layer!r} needs no gradient: either nothing below it is trained, or it is "
                "inside a reentrant checkpoint (give use_reentrant=False)"
            )
        if self._attached is None:
            self._pending.append(_Guided(state, state._version, current.teacher, current.mask))
            return output
        return rebuild(self._inject(self._attached, state, current))

    def _inject(self, attached: _Attached, state: Tensor, current: _Forward) -> Tensor:
        parameters = [parameter for parameter in self.learned.parameters() if parameter.requires_grad]
        if self._passed_by and parameters:
            raise UsageError(
                "the last backward gave the learned parameters of `match` no gradient (pipeline schedules that split "
                "the backward, such as zero bubble, take only those of the stage): use match='linear'"
            )
        step = attached.step()
        weight = self._schedule.at(step)
        state, value = inject(
            state,
            lambda leaf: self._term(leaf, current.teacher, current.mask, attached.num_tokens),
            attached.scale() * weight,
            parameters,
            self._pass_by,
        )
        self._note(step, weight, value)
        return state

    def _pass_by(self) -> None:
        self._passed_by = True

    def _arrived(self, parameter: Tensor) -> None:
        self._passed_by = False

    # --- inside

    def _term(self, student: Tensor, teacher: Tensor, mask: Tensor | None, num_tokens: float | Tensor | None) -> Tensor:
        return mean_value(
            student,
            teacher.to(student.device),
            match=self._match,
            value=self._value,
            mask=mask,
            num_tokens=num_tokens,
        )

    def _take(self, step: int) -> _Guided:
        if self._attached is not None:
            raise UsageError(
                "attach() was called: each forward carries the guidance already, leave out guide(loss, step)"
            )
        self._check_not_ended(step)
        pending, self._pending = self._pending, []
        if len(pending) != 1:
            raise UsageError(
                f"guide() is called once per forward of the model, there were {len(pending)} since the last call "
                "(evaluate under torch.no_grad(); guide.clear() forgets a skipped batch; a model that was compiled and "
                "run before the guide was made needs torch.compiler.reset() after that)"
            )
        guided = pending[0]
        if guided.student._version != guided.version:
            raise UsageError(
                f"the model changes the output of layer {self._layer!r} in place: use guide.attach(step=...)"
            )
        return guided

    def _note(self, step: int, weight: float, value: Tensor) -> None:
        self._meter.at(step)
        self._meter.value, self._meter.weight = value.detach(), weight

    def _check_not_ended(self, step: int) -> None:
        if self._teacher is None and not self._schedule.over(step):
            raise UsageError(f"guidance has ended; step={step} is before stop_step={self._schedule.stop_step}")


def _layer_name(name: str | None, argument: str, logits: bool) -> str:
    if name is None and not logits:
        raise UsageError(f"give {argument}: the name of a layer, as in model.named_modules()")
    return name or ""


def _mask_reader(model: nn.Module, mask: Mask | None) -> Callable[[tuple[Any, ...], dict[str, Any], Tensor], Any]:
    """How to get the mask of a forward out of its arguments and the teacher's state. Any: a tensor or None."""
    if mask is None:
        return lambda args, kwargs, state: None
    if not isinstance(mask, str):
        return lambda args, kwargs, state: mask(args, kwargs)
    read = argument_of(model, mask)
    usual = mask == _USUAL_MASK
    if read is None:
        if usual:
            return lambda args, kwargs, state: None
        raise UsageError(f"mask={mask!r} is no argument of the forward of {type(model).__name__}")

    def per_token(args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor) -> Tensor | None:
        value = read(args, kwargs)
        fits = isinstance(value, Tensor) and value.shape == state.shape[:-1]
        return value if fits or not usual else None  # a usual one of another form says who sees whom in attention

    return per_token


def _tokenizer_of(teacher: Source, tokenizer: Tokenizer | None) -> Tokenizer | None:
    if tokenizer is None and isinstance(teacher, str | os.PathLike):
        return teacher
    return tokenizer


def _check_apart(model: nn.Module, teacher: nn.Module) -> None:
    ours = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in ours for parameter in teacher.parameters()):
        raise UsageError("the teacher shares parameters with the model: give a copy of its own (copy.deepcopy)")


def _match(
    match: str | Match | None,
    side: Side | None,
    widths: tuple[int, int] | None,
    layers: tuple[nn.Module, nn.Module],
    *,
    logits: bool,
) -> Match:
    if side not in (None, "teacher", "student"):
        raise UsageError(f"side={side!r} is unknown: use 'teacher' or 'student'")
    if match is None or (logits and match == "linear"):
        return same_width  # entries of logits are tokens: there is nothing between two of them
    if callable(match):
        return match
    if match == "linear":
        return LinearMatch(side or "teacher")
    if match != "learned" or logits:
        raise UsageError(f"match={match!r} cannot be used here: use 'linear', None or a function (see LateToEarly)")
    student, teacher = widths or (width_of(layers[0]), width_of(layers[1]))
    if student is None or teacher is None:
        raise UsageError("match='learned': the layers do not show how wide they are: give widths=(student, teacher)")
    return LearnedMatch(student, teacher, side or "student")


def _constant(value: Any) -> Callable[[], Any]:  # Any: whatever the caller gave, handed back
    return lambda: value


def _in_backward() -> bool:
    """Whether autograd runs on this thread: a forward now recomputes a checkpointed region."""
    return torch._C._current_graph_task_id() != -1
