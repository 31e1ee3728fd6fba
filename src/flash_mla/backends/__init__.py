"""The backends in order of preference, each a module with the same six functions.

`decode_refusals(call)` and `append_refusals(call)` return the reasons against a call (empty = accepts) from plain
integers; `num_slots(call)` is how many slots a split plan deals out to; `plan`, `decode` and `append` do the work.
"""
