"""Token-level finetuning: forward and backward windows of any size with the gradients of whole sequences."""
