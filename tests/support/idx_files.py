"""IDX files, written independently of the reader."""

import struct

import numpy as np


def idx_bytes(values: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()
