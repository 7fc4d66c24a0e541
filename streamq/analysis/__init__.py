"""What quantization costs, layer by layer."""
