"""What the C library does with the memory of a training process."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Let this process have at hand what it frees, up to a gigabyte at a time, from now on.

    Every step frees all activations and asks for them again. In between glibc gives them back to
    the kernel, and gets them page by page: thousands of faults a step. Other C libraries are left
    as they are. Source: mallopt(3).
    """
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no mallopt, or no such library
        libc = ctypes.CDLL(None)
        sizes = (1 << 30, 32 << 20)  # before glibc 2.35 the second is the largest that it takes
        # The one without the other would be worse than neither: both end that glibc adapts them.
        if any(libc.mallopt(mmap_threshold, size) for size in sizes):
            libc.mallopt(trim_threshold, 2**31 - 1)
