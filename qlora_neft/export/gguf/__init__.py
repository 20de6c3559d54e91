"""Files for llama.cpp and Ollama: an adapter or a model as GGUF, and a Modelfile with the training prompt."""
