"""Pure functions: losses, derivatives, Hessians and approximations of low rank."""

from hessops.functional.approximation import (
    lanczos_low_rank_hessian_approx,
    lanzcos_low_rank_hessian_approx,
    operator_spectral_approximation,
)
from hessops.functional.gradients import (
    PerSampleGradients,
    create_matrix_jacobian_product_function,
    create_per_sample_gradient_function,
    create_per_sample_mixed_derivative_function,
    mean_gradient,
    per_sample_gradients,
)
from hessops.functional.hessian import (
    batch_hvp_gen,
    create_batch_hvp_function,
    create_hvp_function,
    gauss_newton,
    get_hvp_function,
    hessian,
)
from hessops.functional.hvp import hvp
from hessops.functional.losses import (
    batch_loss_function,
    create_batch_loss_function,
    create_empirical_loss_function,
    create_per_sample_loss_function,
    empirical_loss_function,
)
from hessops.functional.low_rank import LowRankProductRepresentation
from hessops.functional.model_approximation import (
    model_hessian_low_rank,
    model_hessian_nystroem_approximation,
)
from hessops.functional.nystroem import (
    operator_nystroem_approximation,
    randomized_nystroem_approximation,
)
from hessops.functional.products import (
    JacobianProducts,
    StackedGradient,
    hessian_products,
)

__all__ = [
    "JacobianProducts",
    "LowRankProductRepresentation",
    "PerSampleGradients",
    "StackedGradient",
    "batch_hvp_gen",
    "batch_loss_function",
    "create_batch_hvp_function",
    "create_batch_loss_function",
    "create_empirical_loss_function",
    "create_hvp_function",
    "create_matrix_jacobian_product_function",
    "create_per_sample_gradient_function",
    "create_per_sample_loss_function",
    "create_per_sample_mixed_derivative_function",
    "empirical_loss_function",
    "gauss_newton",
    "get_hvp_function",
    "hessian",
    "hessian_products",
    "hvp",
    "lanczos_low_rank_hessian_approx",
    "lanzcos_low_rank_hessian_approx",
    "mean_gradient",
    "model_hessian_low_rank",
    "model_hessian_nystroem_approximation",
    "operator_nystroem_approximation",
    "operator_spectral_approximation",
    "per_sample_gradients",
    "randomized_nystroem_approximation",
]
