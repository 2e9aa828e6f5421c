"""What is remembered of batches as long as nobody writes to their tensors."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hessops.nested import tensor_leaves
from hessops.streaming import Batch

T = TypeVar("T")


class BatchMemory(Generic[T]):
    """Values by the identity and the version of a batch's tensors, which are not kept alive.

    Example:
        >>> import torch
        >>> from hessops import Batch
        >>> from hessops.functional.seen import BatchMemory
        >>> memory, batch = BatchMemory(), Batch.from_raw((torch.zeros(2, 1), torch.zeros(2)))
        >>> memory.keep(batch, "known")
        >>> memory.get(batch)
        'known'
        >>> _ = batch.x.fill_(1.0)
        >>> memory.get(batch) is None
        True
    """

    def __init__(self) -> None:
        self._kept: MutableMapping[Tensor, tuple[list[tuple[weakref.ref[Tensor], int]], T]] = (
            WeakIdKeyDictionary()
        )

    def __reduce__(self) -> tuple[type[BatchMemory[T]], tuple[()]]:
        """A copy remembers nothing: it is the identity of tensors that counts."""
        return type(self), ()

    def get(self, batch: Batch) -> T | None:
        """The value of a batch, or ``None`` if one of its tensors was written to since."""
        leaves = list(tensor_leaves((batch.x, batch.y)))
        known = self._kept.get(leaves[0])
        if known is None or any(t.is_inference() for t in leaves):
            return None
        seen, value = known
        same = len(seen) == len(leaves) and all(
            old() is new and version == new._version
            for (old, version), new in zip(seen, leaves, strict=True)
        )
        return value if same else None

    def keep(self, batch: Batch, value: T) -> None:
        """Remembers a value; not for tensors of inference mode, which have no version."""
        leaves = list(tensor_leaves((batch.x, batch.y)))
        if not any(t.is_inference() for t in leaves):
            self._kept[leaves[0]] = [(weakref.ref(t), t._version) for t in leaves], value


class SeenBatches(BatchMemory[bool]):
    """Batches that were looked at before and have not been written to since.

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

    def holds(self, batch: Batch) -> bool:
        """Whether the batch was added, and none of its tensors was written to since."""
        return self.get(batch) is not None

    def add(self, batch: Batch) -> None:
        """Remembers the batch; see `keep`."""
        self.keep(batch, True)
