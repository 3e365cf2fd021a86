"""Throughput measured side by side with the field's other ways of doing the same work."""
