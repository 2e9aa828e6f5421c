r"""
Inputs that are dictionaries
============================

A model in the style of Hugging Face takes its inputs by name, ``model(input_ids=...,
attention_mask=...)``, and returns an object with ``.logits``; its batches are dictionaries, padded
to the longest sequence.

Two small adapters are all that is needed: a module around the model, and a function that takes
batches apart.
"""

# %%
# Data
# ----
#
# Made-up reviews of films: three to nine words, and good if more words praise than blame. One in
# ten has the wrong label. A collate function pads each batch to its own longest review.

import textwrap
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hessops import CgOperator, GeneralizedGaussNewtonOperator, HessianOperator
from hessops.errors import DataChangedError
from hessops.influence import DirectInfluence, SequentialInfluenceCalculator

PLAIN = ["the", "a", "film", "plot", "actor", "scene", "music", "with", "very"]
PRAISE = ["lovely", "warm", "clever", "bright", "moving"]
BLAME = ["dull", "slow", "flat", "noisy", "empty"]
WORDS = ["[pad]", "[cls]", *PLAIN, *PRAISE, *BLAME]

torch.manual_seed(0)


def review():
    """Token numbers, and whether the words are good."""
    while True:
        length = int(torch.randint(3, 10, ()))
        tokens = torch.randint(2, len(WORDS), (length,)).tolist()
        words = [WORDS[token] for token in tokens]
        balance = sum(word in PRAISE for word in words) - sum(word in BLAME for word in words)
        if balance:
            return [1, *tokens], int(balance > 0)


examples = []
for _ in range(400):
    tokens, is_good = review()
    is_wrong = bool(torch.rand(()) < 0.1)
    examples.append({"tokens": tokens, "label": is_good ^ is_wrong, "is_wrong": is_wrong})


def collate(some):
    """A padded batch, as a tokenizer and a data collator make it."""
    rows = [torch.tensor(example["tokens"]) for example in some]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    labels = torch.tensor([example["label"] for example in some])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


train, test = examples[:300], examples[300:]
loader = DataLoader(train, batch_size=50, collate_fn=collate)
print({name: tuple(tensor.shape) for name, tensor in next(iter(loader)).items()})

# %%
# The model
# ---------
#
# A transformer with random weights, built here from PyTorch alone. It has dropout, and computes the
# loss itself if it is given labels, as such models do.


@dataclass
class Output:
    """What the model returns."""

    logits: Tensor
    loss: Tensor | None = None


class Classifier(nn.Module):
    """A transformer encoder with a linear head on the state of the first token."""

    def __init__(self, width=16, heads=2, longest=16):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width, padding_idx=0)
        self.places = nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(width, heads, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids, attention_mask, labels=None):
        """Logits, ``(n, 2)``, and with labels the mean loss."""
        embedded = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        states = self.encoder(embedded, src_key_padding_mask=attention_mask == 0)
        logits = self.head(states[:, 0])
        return Output(
            logits, None if labels is None else nn.functional.cross_entropy(logits, labels)
        )


model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(15):
    for batch in loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

# %%
# Two adapters
# ------------
#
# An operator passes the inputs to the model as *one* argument, here a dictionary, and the model's
# output and the targets to the loss. So the module spreads the dictionary and returns the logits,
# and ``unpack`` separates the labels from a batch. The loss is computed outside, from the logits:
# the labels must not go in.


class Logits(nn.Module):
    """The logits of a model for inputs as a dictionary."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        """Logits, a row for each sequence."""
        return self.model(**inputs).logits


def unpack(batch):
    """A batch as a pair of inputs and targets."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return inputs, batch["labels"]


model.eval()  # dropout must be off: a random loss has no Hessian, and is refused
network, loss = Logits(model), nn.CrossEntropyLoss()
ggn = GeneralizedGaussNewtonOperator(network, loss, loader, unpack=unpack)
print(ggn)

rows = torch.randn(3, ggn.input_size)
products = ggn.apply(rows)
print(CgOperator(ggn, regularization=0.1).solve(rows))

# %%
# Padding
# -------
#
# A point is a sequence: the leading dimension of all tensors. The mask hides the padding, so that
# batches of other sizes, with other padding, have the same matrix. It is worth a try with your
# model: one that reads its padding cannot be told from one that does not by a single way of
# batching.

small = DataLoader(train, batch_size=6, collate_fn=collate)
again = GeneralizedGaussNewtonOperator(network, loss, small, unpack=unpack)
error = (again.apply(rows) - products).norm() / products.norm()
print(f"batches of 6 points: relative difference {error:.1e}")
assert error < 1e-5

# %%
# A loader that shuffles *and* pads each batch to its longest sequence gives other tensors in every
# pass. Data that change are refused:

shuffled = DataLoader(train, batch_size=6, collate_fn=collate, shuffle=True)
changing = GeneralizedGaussNewtonOperator(network, loss, shuffled, unpack=unpack)
try:
    changing.apply(changing.apply(rows))
except DataChangedError as error:
    print(textwrap.fill(f"DataChangedError: {error}", 84))

# %%
# Leave the order fixed, as here, or pad to one length, or pass the batches of one pass as a list:

fixed = GeneralizedGaussNewtonOperator(network, loss, list(shuffled), unpack=unpack)
assert torch.allclose(fixed.apply(rows), products, rtol=1e-3, atol=1e-4)

# %%
# The head alone
# --------------
#
# ``restrict_to`` differentiates by some of the parameters; the rest of the network is then a
# constant. The names are those of the adapter, with ``model.`` in front:

head = [name for name, _ in network.named_parameters() if name.startswith("model.head.")]
of_head = HessianOperator(network, loss, loader, restrict_to=head, unpack=unpack)
eigenvalues = torch.linalg.eigvalsh(of_head.to_dense())
print(f"{head}: {of_head.input_size} of {ggn.input_size} parameters")
print(f"eigenvalues of its Hessian: {eigenvalues[0]:.1e} to {eigenvalues[-1]:.2f}")

# %%
# Influences
# ----------
#
# An influence model takes the same arguments. It has no ``restrict_to``: parameters that are frozen
# are left out. Its methods take inputs and targets as ``unpack`` returns them; a calculator takes
# loaders.

network.requires_grad_(False)
model.head.requires_grad_(True)
influence = DirectInfluence(
    network,
    loss,
    regularization=0.01,
    second_order_mode="generalized_gauss_newton",
    unpack=unpack,
).fit(loader)
test_loader = DataLoader(test, batch_size=50, collate_fn=collate)
scores = SequentialInfluenceCalculator(influence).influences(test_loader, loader).compute()
inputs, labels = unpack(collate(train))
network.requires_grad_(True)
on_itself = influence.self_influence(inputs, labels)

# %%
# A point with a large influence on itself is one that the others do not explain. Among those are
# most of the wrong labels:

suspects = on_itself.topk(40).indices.tolist()
found = sum(train[i]["is_wrong"] for i in suspects)
wrong = sum(example["is_wrong"] for example in train)
print(f"{found} of {wrong} wrong labels are among the 40 largest self-influences")

# %%
# And the training reviews behind one prediction, that for the test review with the largest loss
# among those that have the right label:

with torch.no_grad():
    test_inputs, test_labels = unpack(collate(test))
    losses = nn.functional.cross_entropy(network(test_inputs), test_labels, reduction="none")
is_wrong = torch.tensor([example["is_wrong"] for example in test])
chosen = int(losses.masked_fill(is_wrong, 0).argmax())


def described(example):
    """The words of a review and its label."""
    words = " ".join(WORDS[token] for token in example["tokens"][1:])
    return f"{words} ({'good' if example['label'] else 'bad'})"


order = scores[chosen].argsort(descending=True)
extreme = torch.cat([order[:6], order[-6:]]).tolist()
changes = (scores[chosen, extreme] / len(train)).tolist()
colors = ["#c62828" if train[i]["is_wrong"] else "#0b4f8a" for i in extreme]

figure, axis = plt.subplots(figsize=(10, 4.4), layout="constrained")
axis.barh(range(12), changes, color=colors)
axis.set_yticks(range(12), [described(train[i]) for i in extreme], fontsize=9)
axis.invert_yaxis()
axis.axvline(0, color="#222222", lw=0.8)
axis.set(
    title=f"{described(test[chosen])}, loss {losses[chosen]:.2f}",
    xlabel="change of the loss without it, estimated (red: the label is wrong)",
)
plt.show()

# %%
# With the package transformers
# -----------------------------
#
# The adapters above are those for ``AutoModelForSequenceClassification`` and its relatives: their
# batches, from a tokenizer and ``DataCollatorWithPadding``, have these keys and more, which
# ``**inputs`` passes on. Nothing else differs; this was tried with BERT, RoBERTa, DistilBERT, GPT-2
# and Llama of transformers 5. Their outputs are mappings, so the adapter may also return the whole
# output, if the loss is a function ``loss(output, target)`` of ``output.logits``.
#
# - ``from_pretrained`` returns a model in evaluation mode; after training, call ``model.eval()``.
# - No attention implementation needs to be chosen. Fused kernels cannot be differentiated twice;
#   while an operator computes, PyTorch's mathematical form takes their place, and the setting is
#   restored. ``"flash_attention_2"`` is a kernel of another package, which cannot be replaced: load
#   the model with ``"sdpa"`` or ``"eager"``.
# - Gradient checkpoints need ``use_reentrant=False``.
# - Half precision is fine for products, but not for iterative solvers: use ``model.float()``.
# - Token labels, as of language models: the point is still the sequence. Return one value for each
#   with ``reduction="none"``, such as the sum over its tokens, in which -100 counts nothing. The
#   mean over all tokens of a batch is no mean over sequences, and is refused.
#
# See also
# --------
#
# - :doc:`/concepts/data`: what a loader may yield.
# - :doc:`/recipes/larger_than_memory`: influences that do not fit.
# - :doc:`/recipes/classification`: which matrix to invert.
# - :doc:`/kronecker`: EKFAC, for all layers of a larger model.
