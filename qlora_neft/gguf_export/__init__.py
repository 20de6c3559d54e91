"""What llama.cpp and Ollama load: an adapter or a model as GGUF, and a Modelfile with the prompt of training."""

from __future__ import annotations

from .lora import write_lora_gguf
from .model import write_model_gguf
from .modelfile import modelfile_of_adapter, modelfile_of_model

__all__ = ["modelfile_of_adapter", "modelfile_of_model", "write_lora_gguf", "write_model_gguf"]
