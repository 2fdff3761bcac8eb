"""The C structs of kernel.c, linear.h and draw.h as ctypes, field for field."""

from __future__ import annotations

import ctypes
import struct
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

FP32, BF16, Q8, Q4 = range(4)


class Matrix(Structure):
    _fields_ = (("data", c_void_p), ("n", c_int32), ("k", c_int32), ("kind", c_int32), ("pad", c_int32))


class Grades(Structure):
    _fields_ = (("wide", Matrix * 4), ("spread", c_void_p * 4), ("threshold", c_float * 4))


class Layer(Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("norm_in", "norm_attn_out", "norm_mlp_in", "norm_mlp_out")),
        *((name, c_void_p) for name in ("qkv_bias", "q_norm", "k_norm")),
        ("window", c_int32),
        ("rope", c_int32),
        ("grades", POINTER(Grades)),
    )


class Model(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "intermediate", "vocab", "act_kind")),
        *((name, c_int32) for name in ("gelu", "kv_f32", "max_rows", "tables", "graded")),
        *((name, c_float) for name in ("eps", "attention_scale", "embed_scale", "logit_cap")),
        ("embed", Matrix),
        ("head", Matrix),
        ("layer", POINTER(Layer)),
        ("final_norm", c_void_p),
        ("inv_freq", c_void_p * 2),
        ("rope_scale", c_float * 2),
    )


class Segment(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        *((name, c_int32) for name in ("capacity", "base", "first_row", "num_rows", "is_tree", "shift")),
    )


SEGMENT = struct.Struct("@2Q6i")
"""A `Segment`, for writing one into an array in one step."""


class Batch(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("rows", "segments", "logit_rows", "run_layers")),
        *((name, c_void_p) for name in ("tokens", "parents")),
        ("segment", POINTER(Segment)),
        *((name, c_void_p) for name in ("logit_row", "logits", "hidden", "best", "skip", "mass", "tap_layer", "taps")),
        *((name, c_int32) for name in ("mass_stride", "num_taps")),
        ("errors", c_void_p),
    )


class Law(Structure):
    _fields_ = (("temperature", c_float), ("min_p", c_float), ("top_p", c_double), ("top_k", c_int32), ("vocab", c_int32))


class Drawn(Structure):
    _fields_ = (("total", c_uint64), ("peak", c_float), ("limit", c_uint32))


def declare(library: ctypes.CDLL) -> None:
    """Set argument and result types of the entry points."""
    library.paceline_open.argtypes = [POINTER(Model), ctypes.c_int, ctypes.c_int]
    library.paceline_open.restype = c_void_p
    library.paceline_forward.argtypes = [c_void_p, POINTER(Batch)]
    library.paceline_forward.restype = None
    library.paceline_tiled.argtypes = [c_void_p]
    library.paceline_tiled.restype = ctypes.c_int
    library.paceline_move_slot.argtypes = [c_void_p, POINTER(Segment), ctypes.c_int, ctypes.c_int]
    library.paceline_move_slot.restype = None
    library.paceline_close.argtypes = [c_void_p]
    library.paceline_close.restype = None
    library.paceline_tile_bytes.argtypes = [ctypes.c_int, ctypes.c_int]
    library.paceline_tile_bytes.restype = c_size_t
    library.paceline_lanes.restype = ctypes.c_int
    library.paceline_draw_bytes.argtypes = [ctypes.c_int]
    library.paceline_draw_bytes.restype = c_size_t
    library.paceline_draw.argtypes = [c_void_p, c_void_p, c_uint64, c_void_p, c_void_p]
    library.paceline_draw.restype = ctypes.c_int
    library.paceline_mass.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, ctypes.c_int]
    library.paceline_mass.restype = c_double
