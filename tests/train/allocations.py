"""What the tensors of some code take, counted at each operation."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef


class Allocations(TorchDispatchMode):
    """While it lasts, the tensors that operations return are counted.

    Attributes:
        largest: elements of the largest one. Views count as what they show, so that an
            expanded tensor counts as if it were copied.
        live, peak: bytes of their storages now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self._known: set[WeakIdRef] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        known = WeakIdRef(storage)
        if known in self._known:
            return
        self._known.add(known)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, known, storage.nbytes())

    def _freed(self, known: WeakIdRef, num_bytes: int) -> None:
        self._known.discard(known)
        self.live -= num_bytes
