"""Fine-tune Llama 3 8B, and every model of the Llama architecture, on your own data."""

__version__ = "0.1.0"
