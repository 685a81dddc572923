"""Watches what interpreted Triton kernels touch: on a GPU an address outside of their tensors is another's memory."""

import numpy as np

ranges = (np.zeros(0, np.uint64),) * 2  # first address of each tensor of the launch, and behind its last


def watch(monkeypatch):
    """From now on a load or a store outside of the tensors that a kernel was given is an AssertionError."""
    from triton.runtime import interpreter

    launch, builder = interpreter.GridExecutor._init_args_hst, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def launched(self, args, kwargs):
        global ranges
        args, kwargs = launch(self, args, kwargs)
        ranges = merged([extent(t) for t in (*args, *kwargs.values()) if hasattr(t, "data_ptr") and t.numel()])
        return args, kwargs

    def loaded(self, ptrs, mask, *options):
        check(ptrs, mask, "reads")
        return load(self, ptrs, mask, *options)

    def stored(self, ptrs, value, mask, *options):
        check(ptrs, mask, "writes")
        return store(self, ptrs, value, mask, *options)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", launched)
    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)


def extent(tensor):
    """First address of a tensor, and behind its last."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def merged(extents):
    """Views of one tensor overlap: ranges that do become one."""
    found = []
    for start, stop in sorted(extents):
        if found and start < found[-1][1]:
            found[-1][1] = max(found[-1][1], stop)
        else:
            found.append([start, stop])
    starts, stops = zip(*found, strict=True) if found else ((), ())
    return np.array(starts, np.uint64), np.array(stops, np.uint64)


def check(ptrs, mask, what):
    at = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].ravel()
    starts, stops = ranges
    place = np.searchsorted(starts, at, side="right")
    outside = (place == 0) | (at >= stops[place - 1]) if len(starts) else np.ones(len(at), bool)
    assert not outside.any(), f"a kernel {what} {outside.sum()} of {outside.size} addresses outside of its tensors"
