"""The co-serving engine: token ids in, token ids out, adapters trained in the same iterations.

Knows nothing of text, queues or databases.
"""
