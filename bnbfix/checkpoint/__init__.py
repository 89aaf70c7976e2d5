"""A checkpoint as data: where its bytes come from, safetensors headers, quant states."""
