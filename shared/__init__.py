"""What the services agree on: settings, wire messages, queues, object storage, database models."""
