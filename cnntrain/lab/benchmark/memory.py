"""How much memory a convolution takes beyond its input, its weight and its results: measured.

On a CPU from PyTorch's profiler, which is told of every block that PyTorch's allocator hands out or
takes back, in bytes as asked for: also oneDNN's scratch memory and the copies that it reorders. On
a GPU from the statistics of the caching allocator, whose blocks are multiples of 512 bytes. What
no allocator of PyTorch is asked for does not count: a BLAS's own buffers, Python's lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cnntrain.lab.benchmark.timing import Subject

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Memory:
    """In bytes, without input, weight and bias, and without the results: output and gradients.

    Attributes:
        forward: the most that is in use at once during the forward.
        total: the most during forward and backward. None without backward.
        kept: what is in use between the two. None without backward.
    """

    forward: int
    total: int | None
    kept: int | None


def measure_memory(subject: Subject) -> Memory:
    """Run a forward and its backward once."""
    watched = _watched_on_gpu if subject.x.is_cuda else _watched_on_cpu
    (y,), forward, kept = watched(lambda: [subject.forward()])
    if subject.g is None:
        return Memory(forward, None, None)
    _, backward, _ = watched(lambda: subject.backward(y))
    return Memory(forward, max(forward, kept + backward), kept)


def _watched_on_cpu(call: Callable[[], Results]) -> tuple[Results, int, int]:
    """Results, and by how much the memory in use grew, theirs apart: at most, and at the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    blocks = sorted(_blocks(tree))  # by time
    # An address may have been another block's before: the last one there is the result's.
    last = {address: i for i, (_, address, size) in enumerate(blocks) if size > 0}
    own = {last.get(result.untyped_storage().data_ptr()) for result in results}
    in_use = peak = 0
    for i, (_, _, size) in enumerate(blocks):
        in_use += 0 if i in own else size
        peak = max(peak, in_use)
    return results, peak, in_use


def _blocks(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of all blocks handed out and, with negative bytes, taken back."""
    for event in events:
        if event.name == "[memory]":
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from _blocks(event.children)


def _watched_on_gpu(call: Callable[[], Results]) -> tuple[Results, int, int]:
    """The same, but that results count as if they were there from the start."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
    own = before + sum(storages.values())
    peak, end = torch.cuda.max_memory_allocated() - own, torch.cuda.memory_allocated() - own
    return results, max(peak, 0), max(end, 0)
