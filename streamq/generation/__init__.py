"""Videos from a float or a quantized model, with the transformer streamed."""
