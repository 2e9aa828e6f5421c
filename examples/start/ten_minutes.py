"""
Start here
==========

A first operator, a solve and the leading eigenvalues, in ten minutes.
"""

# %%
# A model and its data
# --------------------
import torch

print(torch.arange(3))
