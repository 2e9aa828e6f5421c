"""An operator of one's own, and inverses, eigenpairs and preconditioners, with hessops."""

import torch

from hessops import (
    CgOperator,
    DirectSolveOperator,
    LowRankOperator,
    MatrixOperator,
    NystroemPreconditioner,
    TensorOperator,
    operator_spectral_approximation,
)

torch.manual_seed(0)
basis, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))
values = torch.logspace(0, -4, 60, dtype=torch.float64)
matrix = (basis * values) @ basis.T
rhs = torch.randn(4, 60, dtype=torch.float64)


class Spectral(TensorOperator):
    """A matrix from its eigenpairs."""

    def __init__(self):
        # What solvers may rely on, instead of trying.
        known = {"symmetric": True, "positive_semidefinite": True}
        super().__init__(len(basis), basis.dtype, basis.device, **known)

    def _apply_vector(self, vector):
        return basis @ (values * (basis.T @ vector))


operator = Spectral()
preconditioner = NystroemPreconditioner(rank=20)  # a recipe, which the solver fits
pairs = operator_spectral_approximation(operator, rank=10, tol=1e-12)
cg = CgOperator(operator, regularization=1e-2, rtol=1e-11)
settings = {"regularization": 1e-2, "rtol": 1e-11}

results = {
    "products": operator.apply(rhs),
    "a matrix times a vector": MatrixOperator(matrix).apply(rhs[0]),
    "direct": DirectSolveOperator(matrix, regularization=1e-2).apply(rhs),
    "CG": cg.apply(rhs),
    "CG of a vector": cg.apply(rhs[0]),
    "CG, preconditioned": CgOperator(operator, **settings, preconditioner=preconditioner).apply(
        rhs
    ),
    "block CG": CgOperator(operator, **settings, use_block_cg=True).apply(rhs),
    "low rank": LowRankOperator(pairs, regularization=1e-2).apply(rhs),
    "low rank, eigenspace alone": LowRankOperator(pairs, 1e-2, exact=False).apply(rhs),
    "eigenvalues": pairs.eigen_vals.sort().values,
}
SHAPE = "pyDVL returns a row `(1, P)` for a vector `(P,)`"
differs = {"a matrix times a vector": SHAPE, "CG of a vector": SHAPE}
