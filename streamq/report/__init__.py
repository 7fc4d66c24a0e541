"""A page that shows what quantization did."""
