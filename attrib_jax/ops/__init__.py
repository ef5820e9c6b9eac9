"""What a platform computes differently, one function each: convolution, attention, norms, micro-batching."""
