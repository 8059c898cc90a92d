"""`flexllm demo`: a customer finetunes while others chat, on one model, in the same iterations.

Drives the running stack from outside, with the official `openai` client, and shows what its users feel: the
time per output token with and without finetuning, the finetuning speed beside serving and alone, the loss,
and the same questions answered by the base model and by the adapter that has just been trained.
"""

from services.demo.scenario import run_demo

__all__ = ["run_demo"]
