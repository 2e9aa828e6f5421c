"""SeenBatches: which tensors were looked at before and have not been written to since."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hessops.nested import tensor_leaves
from hessops.streaming import Batch


class SeenBatches:
    """Batches by the identity and the version of their tensors, which are not kept alive.

    Example:
        >>> import torch
        >>> from hessops import Batch
        >>> from hessops.functional.seen import SeenBatches
        >>> seen, batch = SeenBatches(), Batch.from_raw((torch.zeros(2, 1), torch.zeros(2)))
        >>> seen.add(batch)
        >>> seen.holds(batch)
        True
        >>> _ = batch.x.fill_(1.0)
        >>> seen.holds(batch)
        False
    """

    def __init__(self) -> None:
        self._seen: MutableMapping[Tensor, list[tuple[weakref.ref[Tensor], int]]] = (
            WeakIdKeyDictionary()
        )

    def __reduce__(self) -> tuple[type[SeenBatches], tuple[()]]:
        """A copy has seen nothing: it is the identity of tensors that counts."""
        return SeenBatches, ()

    def holds(self, batch: Batch) -> bool:
        """Whether the batch was added, and none of its tensors was written to since."""
        leaves = list(tensor_leaves((batch.x, batch.y)))
        if any(t.is_inference() for t in leaves):
            return False
        seen = self._seen.get(leaves[0], ())
        return len(seen) == len(leaves) and all(
            old() is new and version == new._version
            for (old, version), new in zip(seen, leaves, strict=True)
        )

    def add(self, batch: Batch) -> None:
        """Remembers the batch; tensors of inference mode, which have no version, are not."""
        leaves = list(tensor_leaves((batch.x, batch.y)))
        if not any(t.is_inference() for t in leaves):
            self._seen[leaves[0]] = [(weakref.ref(t), t._version) for t in leaves]
