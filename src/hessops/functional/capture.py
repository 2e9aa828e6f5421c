"""What goes into and comes out of some modules while a model runs on a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hessops.errors import ModelError
from hessops.functional.products import StackedGradient, differentiable
from hessops.isolation import is_transformed
from hessops.nested import differentiable_leaves
from hessops.objective import Objective
from hessops.streaming import Batch


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        input: The tensor it was called with.
        output: The tensor it returned, with the graph that leads on to the model's output.
    """

    input: Tensor
    output: Tensor


@dataclass
class _Recorder:
    """Keeps the calls of some modules; of a module with other arguments, only that there were."""

    copies: bool
    calls: dict[str, list[Call | None]] = field(default_factory=dict)
    without_graph: set[str] = field(default_factory=set)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def hook_of(self, name: str) -> object:
        def record(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
        ) -> object:
            given = [*args, *kwargs.values()]
            mapped = len(given) == 1 and isinstance(given[0], Tensor)
            if not mapped or not isinstance(output, Tensor) or is_transformed(output):
                self.calls.setdefault(name, []).append(None)
                return None
            if not output.requires_grad:
                self.without_graph.add(name)
                return None
            assert isinstance(given[0], Tensor)
            x = given[0].detach()
            call = Call(x.clone() if self.copies else x, output)
            self.calls.setdefault(name, []).append(call)
            if self.copies:
                return output.clone()
            self.versions += [(x, x._version), (output, output._version)]
            return None

        return record

    @property
    def is_whole(self) -> bool:
        """Whether nothing that was kept was written to afterwards."""
        return all(tensor._version == version for tensor, version in self.versions)


class CapturedRun:
    r"""One run of a model, with the calls of some of its modules.

    Args:
        objective: Model and loss, at whose parameters it runs.
        batch: n points.
        modules: Name -> module of ``objective.model``.

    Attributes:
        output: The model's output, with its graph.
        leaves: The parameters that it leads to.
        calls: Name -> calls with a graph, in their order; ``None`` for one that did not map a
            tensor to a tensor.

    Raises:
        ModelError: A module that has no call with a graph (a checkpoint that hides it).

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional.capture import CapturedRun
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
        >>> objective = Objective(model, torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> run = CapturedRun(objective, batch, {"0": objective.model[0]})
        >>> run.gradients([torch.ones(1, 4, 2)])["0"][0].shape
        torch.Size([1, 4, 2])
    """

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        modules: Mapping[str, nn.Module],
    ) -> None:
        self._objective, self._modules = objective, modules
        self.leaves = differentiable(objective.params)
        recorder = _Recorder(copies=False)
        self.output = self._run(batch, recorder)
        if not recorder.is_whole:
            # An operation in place after a module: what it returned is something else by now.
            recorder = _Recorder(copies=True)
            self.output = self._run(batch, recorder)
        self.calls = recorder.calls
        # A call without a graph beside others has no gradient; one of its own is a hidden one.
        hidden = sorted(recorder.without_graph - set(recorder.calls))
        if hidden:
            raise ModelError(
                f"the outputs of the modules {hidden} have no graph (a checkpoint with "
                "use_reentrant=True, or torch.no_grad inside the model?), so that gradients "
                "cannot be followed; use use_reentrant=False, or freeze their parameters"
            )

    def _run(self, batch: Batch, recorder: _Recorder) -> object:
        with _hooked(self._modules, recorder), torch.enable_grad():
            return self._objective.output(self.leaves, batch.x)

    def on(self, batch: Batch) -> CapturedRun:
        """A run of the same model with the same modules on another batch."""
        return CapturedRun(self._objective, batch, self._modules)

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs of all calls, by module in the order of `calls`."""
        return [c.output for calls in self.calls.values() for c in calls if c is not None]

    def _by_module(self, gradients: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """What is in the order of `outputs`, by name of the module."""
        remaining = iter(gradients)
        found = {
            name: [next(remaining) for call in calls if call is not None]
            for name, calls in self.calls.items()
        }
        return {name: some for name, some in found.items() if some}

    @property
    def parts(self) -> list[Tensor]:
        """The floating-point tensors of the output."""
        return differentiable_leaves(self.output)

    def gradients(
        self, columns: Sequence[Tensor], stacked_gradient: StackedGradient | None = None
    ) -> dict[str, list[Tensor]]:
        """Gradients by the output of every call, ``(k, *output)``, for weights of the outputs.

        Args:
            columns: One tensor ``(k, *output)`` per output of the model.
            stacked_gradient: Reused between calls, it remembers whether vectorising works.
        """
        gradient_of = stacked_gradient or StackedGradient()
        # A model may compute its outputs in another dtype.
        columns = [column.to(part) for column, part in zip(columns, self.parts, strict=True)]
        outputs = self.outputs
        return self._by_module(gradient_of(self.parts, outputs, columns)) if outputs else {}

    def follow(self, weights: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """As `gradients` of a single column, without its dimension: ``(*output)`` for each call."""
        found = self.gradients([weight.unsqueeze(0) for weight in weights])
        return {name: [gradient[0] for gradient in some] for name, some in found.items()}

    def follow_to_parameters(
        self, weights: Sequence[Tensor]
    ) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """Gradients by the outputs of the calls and by the parameters, in one backward pass.

        Args:
            weights: One tensor ``(*output)`` per output of the model.

        Returns:
            Name of a module -> ``(*output)`` for each call; name of a parameter -> its shape.
        """
        outputs, columns = self.outputs, [weight.unsqueeze(0) for weight in weights]
        inputs = [*outputs, *self.leaves.values()]
        found = [gradient[0] for gradient in StackedGradient()(self.parts, inputs, columns)]
        by_parameter = dict(zip(self.leaves, found[len(outputs) :], strict=True))
        return self._by_module(found[: len(outputs)]), by_parameter


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], recorder: _Recorder) -> Iterator[None]:
    handles = []
    try:
        for name, module in modules.items():
            hook = recorder.hook_of(name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))  # type: ignore[arg-type]  # as torch calls it
        yield
    finally:
        for handle in handles:
            handle.remove()
