"""gemma-pack turns bf16 Gemma weights into quantized variants that a platform team can trust and ship."""

__version__ = "0.1.0"
