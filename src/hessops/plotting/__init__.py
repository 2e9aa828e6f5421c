"""Pictures of what was computed: matplotlib axes in, axes out (extra ``plot``).

Every function draws on the axes that it is given, and makes a figure with pyplot only where there
are none; nothing global is changed. Titles are left to the caller. NaN and infinity are refused
with a `NonFiniteError` before anything is drawn; of a residual history, which may overflow where a
recurrence diverged, they are left out. Colours are told apart by readers who are blind
to some, and, by dashes, markers or lightness, without any.
"""

try:
    import matplotlib as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "hessops.plotting draws with matplotlib; install it with: pip install 'hessops[plot]'"
    ) from error

from hessops.plotting.comparison import preconditioner_comparison
from hessops.plotting.density import spectral_density
from hessops.plotting.heatmap import influence_heatmap
from hessops.plotting.intervals import estimates
from hessops.plotting.residuals import convergence
from hessops.plotting.rows import top_rows
from hessops.plotting.scatter import score_comparison
from hessops.plotting.spectrum import eigenvalues
from hessops.plotting.tiles import top_examples

__all__ = [
    "convergence",
    "eigenvalues",
    "estimates",
    "influence_heatmap",
    "preconditioner_comparison",
    "score_comparison",
    "spectral_density",
    "top_examples",
    "top_rows",
]
