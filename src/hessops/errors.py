"""Typed errors and warnings.

Every error of `hessops` derives from `HessopsError` and from the built-in exception that says what
kind of mistake it is, so that ``except ValueError`` keeps working. A message names the argument,
what came, what was expected and what to do.

Every warning derives from `HessopsWarning`, so that a filter can name all of them or one kind; it
points at the line that called the library.

.. code-block:: text

    HessopsWarning (a UserWarning)
    ├─ ConvergenceWarning           a value is less accurate than was asked for
    ├─ IndefiniteSketchWarning      a sketch is of the positive part only
    ├─ ZeroShiftWarning             a preconditioner chose a shift by itself
    ├─ UncoveredParametersWarning   an influence model leaves parameters out
    └─ CompileWarning               a product is slower than it could be
"""

from __future__ import annotations

import pickle


class HessopsError(Exception):
    """Base class of every error raised by `hessops`."""


class ArgumentError(HessopsError, ValueError):
    """An argument has the right type but a value that cannot be used."""


class ReadOnlyError(HessopsError, AttributeError):
    """An attribute that other things were made from is assigned; the message says what to call."""


class ArgumentTypeError(HessopsError, TypeError):
    """An argument has a type that cannot be used."""


class ShapeError(HessopsError, ValueError):
    """A tensor has a shape that does not fit."""


class DtypeError(HessopsError, TypeError):
    """A tensor has another dtype than the operator; nothing is cast silently."""


class DeviceError(HessopsError, ValueError):
    """Tensors lie on devices that cannot be combined, or an operator cannot be moved."""


class NonFiniteError(HessopsError, ValueError):
    """NaN or infinity in parameters, data, a vector or a product."""


class ParameterNameError(HessopsError, ValueError):
    """A parameter name is unknown, missing, superfluous, frozen or given twice."""


class ModelError(HessopsError, ValueError):
    """The model cannot be differentiated as a function of its parameters and one batch."""


class TrainingModeError(ModelError):
    """The model's forward is random or couples the points of a batch (dropout, batch-norm)."""


class LossError(HessopsError, ValueError):
    """The loss is not the mean, sum or vector of per-sample losses it is claimed to be."""


class DataError(HessopsError, ValueError):
    """The data are empty, of an unknown form, or inconsistent within a batch."""


class DataChangedError(DataError):
    """Two passes over the data did not give the same points."""


class OneShotDataError(DataError, TypeError):
    """The data can be iterated only once, but operators make a pass for every application."""


class StructureError(HessopsError, ValueError):
    """An operator lacks the structure (symmetry, definiteness, an adjoint) that is needed."""


class SingularOperatorError(HessopsError, ValueError):
    """A matrix or operator is singular to working precision, so that it has no inverse."""


class MissingInverseError(StructureError):
    """The operator has no inverse in closed form and no solver was given."""


class MemoryLimitError(HessopsError, MemoryError):
    """A dense result would not fit into memory."""


class SolverError(HessopsError, ArithmeticError):
    """A solve ended without an answer that could be returned."""


class IndefiniteOperatorError(SolverError):
    """The operator has negative curvature, so that conjugate gradients do not apply."""


class SolverBreakdownError(SolverError):
    """A solve met a direction of zero curvature before it reached its tolerance."""


class DivergenceError(SolverError):
    """A recursion grew without bound; the message names the argument to change."""


class PreconditionerError(SolverError):
    """A preconditioner turned out not to be positive definite."""


class NonFiniteProductError(SolverError, NonFiniteError):
    """A product of finite vectors is NaN or infinite."""


class ForwardModeError(HessopsError, ArithmeticError):
    """Forward-mode differentiation is refused or wrong for this model."""


class ConformanceError(HessopsError, AssertionError):
    """An operator does not keep a promise that `hessops.testing` checks."""


class IHVPUsageError(HessopsError, ValueError):
    """A function of `hessops.ihvp` was built or called with arguments that cannot be used."""


class HessopsWarning(UserWarning):
    """Base class of every warning issued by `hessops`."""


class ConvergenceWarning(HessopsWarning):
    """A solve, or a search for eigenpairs, stopped short of what was asked for.

    A `Solution` says by how much.
    """


class IndefiniteSketchWarning(HessopsWarning):
    """A Nyström sketch met negative eigenvalues, which it leaves out."""


class ZeroShiftWarning(HessopsWarning):
    """A preconditioner needs a positive shift and took the smallest safe one."""


class UncoveredParametersWarning(HessopsWarning):
    """Trainable parameters belong to no block of an influence model."""


class CompileWarning(HessopsWarning):
    """A product could not be compiled; it is computed without, with the same result."""


class DistributedError(HessopsError, RuntimeError):
    """Processes that work on one sum are not in step, or one of them is gone."""


class RemoteError(DistributedError):
    """Another process of the group raised an error, which the message repeats."""


class NotFittedError(HessopsError, RuntimeError):
    """An influence model is used before ``fit``."""


class CopyError(HessopsError, pickle.PicklingError, TypeError):
    """A part of an object can be neither copied nor pickled."""


class StoreError(HessopsError, ValueError):
    """What lies at a path is not what this computation, or this model, would have written."""
