"""The GPU worker: serves requests and trains adapters in the same iterations, on one copy of the model."""
