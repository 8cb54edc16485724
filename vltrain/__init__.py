"""Fine-tune vision-language models on your own pictures, conversations and boxes."""

__version__ = "0.1.0"
