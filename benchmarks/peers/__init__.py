"""Our engine beside transformers, peft, vLLM and llama.cpp on one model, in one run."""
