"""What quantization cost: likelihood, divergence, generation parity, and the verdict on them."""
