"""Makes Triton run in its interpreter where there is no GPU; this has to happen before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
