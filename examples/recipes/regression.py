r"""
Regression
==========

Uncertainty of a regression.

.. math:: A = \frac{1}{N}\sum_i x_i^T
"""

# %%
# Data
# ----
import matplotlib.pyplot as plt
import torch

plt.plot(torch.arange(3))
