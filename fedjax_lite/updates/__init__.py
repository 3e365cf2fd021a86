"""What happens to updates between clients and server."""
