"""Bodies of requests, checked strictly: right types, bounded sizes, no unknown field."""
