"""The model and the data that the scripts before and after a migration share."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
torch.set_num_threads(1)

_images, _labels = load_digits(return_X_y=True)
# Every second pixel of every second row: a model small enough for a dense reference.
_pixels = (_images.reshape(-1, 8, 8)[:, ::2, ::2] / 16).reshape(-1, 16)
x = torch.tensor(_pixels[:250])
y = torch.tensor(_labels[:250])
x_test = torch.tensor(_pixels[250:258])
y_test = torch.tensor(_labels[250:258])

loss = nn.CrossEntropyLoss()
model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10)).double()
_optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(60):
    _optimizer.zero_grad()
    loss(model(x), y).backward()
    _optimizer.step()
model.zero_grad()
model.eval()

# 250 points in batches of 64: the last one is smaller, as it is in most loaders.
loader = DataLoader(TensorDataset(x, y), batch_size=64)
test_loader = DataLoader(TensorDataset(x_test, y_test), batch_size=4)
